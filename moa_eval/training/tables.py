"""Every table, made once: CSV files, Markdown and the page show the same rows of plain values.

A column that ends in `_difference` or `_ratio` compares with the baseline, of several with that of the same size:
with its best arm, or its median over runs. NaN stands for what is not known or does not apply.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np

from moa_eval.page.formatting import show
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Contender, Contrast
from moa_eval.training.configuration import ffn_part, role
from moa_eval.training.experts import Experts, expert_rows, load_rows
from moa_eval.training.mixing import STATIC, Mixing
from moa_eval.training.probes import probe_rows, probe_run_rows
from moa_eval.training.runs import Columns, Run
from moa_eval.training.scaling import Line, line_rows, scaling_rows
from moa_eval.training.seeds import by_seed, deviation, mean, quotient

Tables = dict[str, list[Row]]

TOLERANCE = 0.01  # rates whose loss lies within this part of the best one's are said to be as good
_COSTS: dict[str, Callable[[Run], float]] = {  # column -> where a run keeps it
    "parameters": lambda run: run.figure("parameters", "total"),
    "mixing_parameters": lambda run: run.figure("parameters", "mixing"),
    "flops_per_unit": lambda run: run.flops_per_unit,
    "units_per_s": lambda run: run.throughput,
    "peak_memory_mib": lambda run: run.figure("peak_memory_mib"),
    "training_time_s": lambda run: run.training_s,
}
_UNSHOWN_KEYS = ("name", "out", "resume")  # of the configuration: the table of runs names the runs
_DIFFERENCE = ("difference", "relative", "low_95", "high_95")
_CORNERS = {"final": lambda values: values[-1], "best": lambda values: np.nanmin(values)}


def make_tables(
    comparison: Comparison, mixings: Mapping[int, Mixing], experts: Mapping[int, Experts], lines: Sequence[Line]
) -> Tables:
    """Every table by name; one that has nothing to say is empty."""
    labelled = list(zip(comparison.labels, comparison.runs, strict=True))
    return {
        "losses": loss_rows(comparison),
        "runs": run_rows(comparison),
        "rates": rate_rows(comparison),
        "tolerance": tolerance_rows(comparison),
        "equal_rates": equal_rate_rows(comparison),
        "costs": cost_rows(comparison),
        "parameters": parameter_rows(comparison),
        "scaling": scaling_rows(comparison, lines),
        "scaling_lines": line_rows(lines),
        "probe": probe_rows(comparison),
        "probe_runs": probe_run_rows(comparison),
        "reconstructions": [row for label, run in labelled for row in _reconstruction_rows(label, run)],
        "mixing": mixing_rows(comparison, mixings),
        "experts": expert_rows(comparison, experts),
        "expert_load": load_rows(comparison, experts),
        "config": config_rows(comparison),
        "environment": environment_rows(comparison, packages=False),
        "packages": environment_rows(comparison, packages=True),
        "validation": [row for label, run in labelled for row in _curve_rows(label, run, run.validation)],
        "train": [row for label, run in labelled for row in _curve_rows(label, run, run.train)],
    }


def loss_rows(comparison: Comparison) -> list[Row]:
    """A row a contender, at its best rate: final and best validation loss in every space, over seeds.

    "final" is the last validation, "best" the lowest, of runs that came to the end; both are means over seeds, `_sd`
    their standard deviation.
    The difference and its 95 % interval are of the last validation that both sides share.
    """
    rows = []
    for index, contender in enumerate(comparison.contenders):
        arm = None if contender.best is None else comparison.arms[contender.best]
        runs = [] if arm is None else comparison.complete(arm.runs)
        row: Row = {
            "contender": contender.label,
            "baseline": "" if contender.baseline is None else comparison.baseline_of(index).label,
            "rate": math.nan if arm is None else arm.rate,
            "rates_tried": len(contender.arms),
            "seeds": len({run.seed for run in runs}),
            "unit": comparison.kind.unit,
            "seen": min((run.seen for run in runs), default=0),
        }
        for loss in comparison.kind.losses:
            for corner in _CORNERS:
                values = _over_seeds(runs, loss, corner).values()
                row |= {f"{corner}_{loss}": mean(values), f"{corner}_{loss}_sd": deviation(values)}
            row |= _difference_columns(loss, _contrast_of(comparison, contender, loss))
        rows.append(row)
    return rows


def run_rows(comparison: Comparison) -> list[Row]:
    """A row a run: final and best validation loss; differences are to the mean of the baseline's best arm.

    "is_baseline" marks the only run of a baseline, which is not compared with itself.
    """
    rows = []
    for index, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True)):
        arm = comparison.arm_of(index)
        contender = comparison.contenders[comparison.contender_of(index)]
        reference = comparison.baseline_of(comparison.contender_of(index)).best
        baseline = [] if reference is None else comparison.complete(comparison.arms[reference].runs)
        is_baseline = len(baseline) == 1 and baseline[0] is run
        baseline = [] if is_baseline else baseline
        row: Row = {
            "run": label,
            "contender": contender.label,
            "name": run.name,
            "rate": run.peak_lr,
            "seed": run.seed,
            "is_best": arm == contender.best,
            "is_baseline": is_baseline,
            "status": run.status,
            "unit": run.unit,
            "seen": run.seen,
        }
        for loss in comparison.kind.losses:
            for corner in _CORNERS:
                value = _corner(run, loss, corner)
                gap = value - mean(_over_seeds(baseline, loss, corner).values())
                row |= {
                    f"{corner}_{loss}": value,
                    f"{corner}_{loss}_difference": gap,
                    f"{corner}_{loss}_relative": quotient(gap, value - gap),
                }
        rows.append(row)
    return rows


def rate_rows(comparison: Comparison) -> list[Row]:
    """A row an arm: its final loss over seeds, and by which part that exceeds its contender's best.

    Runs that diverged or are unfinished are counted, and do not enter the loss.
    """
    rows = []
    for contender in comparison.contenders:
        best = math.nan if contender.best is None else _arm_mean(comparison, contender.best)
        for arm in contender.arms:
            own = comparison.arms[arm]
            values = [*_over_seeds(comparison.complete(own.runs), comparison.metric, "final").values()]
            rows.append(
                {
                    "contender": contender.label,
                    "rate": own.rate,
                    "loss": comparison.metric,
                    "seeds": len(values),
                    "mean": mean(values),
                    "sd": deviation(values),
                    "min": min(values, default=math.nan),
                    "max": max(values, default=math.nan),
                    "runs": len(own.runs),
                    "diverged": sum(comparison.runs[run].diverged_at is not None for run in own.runs),
                    "unfinished": sum(map(comparison.falls_short, own.runs)),
                    "is_best": arm == contender.best,
                    "excess": quotient(mean(values) - best, best),
                }
            )
    return rows


def tolerance_rows(comparison: Comparison) -> list[Row]:
    """A row a contender: which rates were tried and how far the good ones reach.

    "edge" says whether the best rate is the "lowest" or "highest" tried, so that a better one may lie beyond it.
    "span" is the ratio of the highest to the lowest rate within 1 % of the best arm's loss, without a worse,
    diverged or unfinished rate between.
    """
    rows = []
    for contender in comparison.contenders:
        rates = [comparison.arms[arm].rate for arm in contender.arms]
        low, high = _good_rates(comparison, contender)
        best = math.nan if contender.best is None else comparison.arms[contender.best].rate
        rows.append(
            {
                "contender": contender.label,
                "rates_tried": len(rates),
                "lowest_rate": rates[0],
                "highest_rate": rates[-1],
                "best_rate": best,
                "edge": edge(comparison, contender),
                "low_good_rate": low,
                "high_good_rate": high,
                "span": quotient(high, low),
                "diverged_rates": sum(
                    any(comparison.runs[run].diverged_at is not None for run in comparison.arms[arm].runs)
                    for arm in contender.arms
                ),
            }
        )
    return rows


def edge(comparison: Comparison, contender: Contender) -> str:
    """Where in its grid a contender's best rate lies: "lowest" or "highest"; "" inside, or without a choice."""
    if not contender.chosen or contender.best is None:
        return ""
    return {contender.arms[0]: "lowest", contender.arms[-1]: "highest"}.get(contender.best, "")


def equal_rate_rows(comparison: Comparison) -> list[Row]:
    """Every other contender against the baseline at each peak rate that both were trained at, in every space."""
    rows = []
    for loss in comparison.kind.losses:
        for contrast in comparison.equal_rates(loss):
            sides = (comparison.arms[arm].runs[0] for arm in (contrast.arm, contrast.reference))
            contender, baseline = (comparison.contenders[comparison.contender_of(run)].label for run in sides)
            rows.append(
                {
                    "contender": contender,
                    "baseline": baseline,
                    "rate": comparison.arms[contrast.arm].rate,
                    "loss": loss,
                    "seen": contrast.seen or 0,
                    "seeds": len(contrast.values),
                    "baseline_seeds": len(contrast.baseline),
                    "mean": mean(contrast.values.values()),
                    "baseline_mean": mean(contrast.baseline.values()),
                    "difference": contrast.interval.mean,
                    "relative": contrast.relative,
                    "low_95": contrast.interval.low,
                    "high_95": contrast.interval.high,
                }
            )
    return rows


def cost_rows(comparison: Comparison) -> list[Row]:
    """A row a contender: medians over the runs of its best arm (of all its runs if it has none), as ratios too.

    Unfinished runs enter only where there are no others: their training time is not that of the whole.
    """
    rows: list[Row] = []
    for contender in comparison.contenders:
        arms = contender.arms if contender.best is None else (contender.best,)
        members = [run for arm in arms for run in comparison.arms[arm].runs]
        runs = comparison.complete(members) or [comparison.runs[run] for run in members]
        row: Row = {"contender": contender.label, "runs": len(runs), "unit": comparison.kind.unit}
        row["device"] = ", ".join(dict.fromkeys(run.device for run in runs))
        for name, read in _COSTS.items():
            row[name] = median([value for value in map(read, runs) if not math.isnan(value)] or [math.nan])
            row[f"{name}_ratio"] = math.nan  # its column, filled once every row is there
        row["mixing_share"] = quotient(row["mixing_parameters"], row["parameters"])
        rows.append(row)
    for row, contender in zip(rows, comparison.contenders, strict=True):
        baseline = row if contender.baseline is None else rows[contender.baseline]
        row |= {f"{name}_ratio": quotient(row[name], baseline[name]) for name in _COSTS}
    return rows


def parameter_rows(comparison: Comparison) -> list[Row]:
    """A row a contender: what its parameters add to the baseline's, beside what they take from the loss.

    Empty unless this is controlled for: another contender has its baseline's FFN with more or fewer parameters.
    """
    costs, losses = cost_rows(comparison), loss_rows(comparison)
    if not any(_is_control(comparison, index, costs) for index in comparison.alternatives):
        return []
    rows: list[Row] = []
    for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        row: Row = {key: loss[key] for key in ("contender", "baseline", "rate", "seeds")}
        row |= {key: cost[key] for key in ("parameters", "parameters_ratio", "mixing_parameters")}
        row |= {"is_control": _is_control(comparison, index, costs), "loss": loss[f"final_{comparison.metric}"]}
        rows.append(row | {key: loss[f"{comparison.metric}_{key}"] for key in _DIFFERENCE})
    return rows


def mixing_rows(comparison: Comparison, mixings: Mapping[int, Mixing]) -> list[Row]:
    """A row a run, recorded step, layer and coefficient: its spread over the tokens and its share of the sum."""
    return [
        {
            "run": comparison.labels[run],
            "step": step,
            "layer": layer.name,
            "coefficient": term,
            "token_adaptive": layer.token_adaptive,
            **{key: float(getattr(layer, key)[at]) for key in ("mean", "std", "low", "high", "share")},
            "static": bool(layer.std[at] < STATIC),
        }
        for run, mixing in mixings.items()
        for step, layers in mixing.steps.items()
        for layer in layers
        for at, term in enumerate(layer.terms)
    ]


def config_rows(comparison: Comparison) -> list[Row]:
    """The keys of the configuration that differ, with the values of every contender."""
    members = [[run for arm in own.arms for run in comparison.arms[arm].runs] for own in comparison.contenders]
    rows = []
    for key, values in comparison.differing.items():
        if key in _UNSHOWN_KEYS:
            continue
        row: Row = {"key": key, "kind": role(key, values)}
        for contender, runs in zip(comparison.contenders, members, strict=True):
            row[contender.label] = ", ".join(dict.fromkeys(show(values[run]) for run in runs))
        rows.append(row)
    return rows


def environment_rows(comparison: Comparison, *, packages: bool) -> list[Row]:
    """The versions of the packages, or everything else but the command: a row a key and value, with its runs.

    "runs" is "all" where every run has the value.
    """
    shown = [run.environment.get("packages") if packages else run.environment for run in comparison.runs]
    shown = [own if isinstance(own, dict) else {} for own in shown]
    rows = []
    for key in dict.fromkeys(key for values in shown for key in values if key not in ("packages", "command")):
        texts = [show(values.get(key)) for values in shown]
        for text in dict.fromkeys(texts):
            owners = [label for label, own in zip(comparison.labels, texts, strict=True) if own == text]
            rows.append({"key": key, "value": text, "runs": "all" if len(owners) == len(shown) else "; ".join(owners)})
    return rows


def _is_control(comparison: Comparison, contender: int, costs: Sequence[Row]) -> bool:
    own, baseline = comparison.contenders[contender], comparison.baseline_of(contender)
    ffns = [ffn_part(comparison.runs[comparison.arms[side.arms[0]].runs[0]].config) for side in (own, baseline)]
    ratio = costs[contender]["parameters_ratio"]
    return own is not baseline and ffns[0] == ffns[1] and not math.isnan(ratio) and ratio != 1


def _corner(run: Run, loss: str, corner: str) -> float:
    values = run.validation[loss]
    if corner == "best" and not np.isfinite(values).any():
        return math.nan
    return float(_CORNERS[corner](values)) if len(values) else math.nan


def _over_seeds(runs: Sequence[Run], loss: str, corner: str) -> dict[int, float]:
    return by_seed(runs, [_corner(run, loss, corner) for run in runs])


def _arm_mean(comparison: Comparison, arm: int) -> float:
    runs = comparison.complete(comparison.arms[arm].runs)
    return mean(_over_seeds(runs, comparison.metric, "final").values())


def _contrast_of(comparison: Comparison, contender: Contender, loss: str) -> Contrast | None:
    if contender.baseline is None:
        return None
    return next((own for own in comparison.contrasts(loss) if own.arm == contender.best), None)


def _difference_columns(loss: str, contrast: Contrast | None) -> Row:
    if contrast is None:
        return {f"{loss}_{name}": math.nan for name in _DIFFERENCE} | {f"{loss}_interval": ""}
    interval = contrast.interval
    values = (interval.mean, contrast.relative, interval.low, interval.high)
    row: Row = {f"{loss}_{name}": value for name, value in zip(_DIFFERENCE, values, strict=True)}
    kind = "" if math.isnan(interval.low) else "paired t" if interval.paired else "Welch t"
    return row | {f"{loss}_interval": kind}


def _good_rates(comparison: Comparison, contender: Contender) -> tuple[float, float]:
    """The lowest and highest rate around the best one that are as good; NaN without a best one."""
    if contender.best is None:
        return math.nan, math.nan
    limit = _arm_mean(comparison, contender.best) * (1 + TOLERANCE)

    def good(arm: int) -> bool:
        complete = len(comparison.complete(comparison.arms[arm].runs)) == len(comparison.arms[arm].runs)
        return complete and _arm_mean(comparison, arm) <= limit

    low = high = contender.arms.index(contender.best)
    while low > 0 and good(contender.arms[low - 1]):
        low -= 1
    while high < len(contender.arms) - 1 and good(contender.arms[high + 1]):
        high += 1
    return comparison.arms[contender.arms[low]].rate, comparison.arms[contender.arms[high]].rate


def _curve_rows(label: str, run: Run, columns: Columns) -> list[Row]:
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = ({"run": label} | dict(zip(columns, row, strict=True)) for row in values)
    return [row | {key: int(row[key]) for key in ("step", run.counter)} for row in rows]


def _reconstruction_rows(label: str, run: Run) -> list[Row]:
    return [
        {"run": label, "step": run.reconstructions_step, "key": image.key}
        | {"loss_norm": image.loss_norm, "loss_pixel": image.loss_pixel}
        for image in run.reconstructions
    ]
