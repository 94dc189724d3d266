"""Tables of a comparison; CSV files, Markdown and the page show the same rows.

Columns that end in `_difference` or `_ratio` compare with the best group of the baseline, or with its median over
runs. NaN stands for unknown values and for values that do not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from moa_eval.page.formatting import rate, show
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Contrast, Method, RunGroup
from moa_eval.training.configuration import role
from moa_eval.training.experts import last_step
from moa_eval.training.intervals import UNKNOWN, by_seed, deviation, difference, mean, quotient
from moa_eval.training.runs import Columns, Run
from moa_eval.training.tolerance import tolerance_rows

Tables = dict[str, list[Row]]

_COSTS: dict[str, Callable[[Run], float]] = {
    "parameters": lambda run: run.number("parameters", "total"),
    "mixing_parameters": lambda run: run.number("parameters", "mixing"),
    "flops_per_unit": lambda run: run.flops_per_unit,
    "units_per_s": lambda run: run.throughput,
    "peak_memory_mib": lambda run: run.number("peak_memory_mib"),
    "training_time_s": lambda run: run.training_s,
}
_CORNERS: dict[str, Callable[[Run, str], float]] = {"final": Run.final, "best": Run.best}
_DIFFERENCE = ("difference", "relative", "low_95", "high_95")
_PROBES = ("knn", "linear", "finetune")  # in the order of the table
_UNSHOWN_KEYS = ("name", "out", "resume")


def make_tables(comparison: Comparison) -> Tables:
    """Return every table by name; a table without content is empty."""
    return {
        "losses": loss_rows(comparison),
        "runs": run_rows(comparison),
        "rates": rate_rows(comparison),
        "tolerance": tolerance_rows(comparison),
        "equal_rates": equal_rate_rows(comparison),
        "costs": cost_rows(comparison),
        "probe": probe_rows(comparison),
        "probe_runs": [{"run": run.label} | probe for run in comparison.runs for probe in run.probes],
        "reconstructions": _reconstruction_rows(comparison),
        "mixing": [{"run": run.label} | row for run in comparison.runs if run.mixing for row in run.mixing.rows],
        "experts": expert_rows(comparison),
        "expert_load": expert_load_rows(comparison),
        "config": config_rows(comparison),
        "evaluations": evaluation_rows(comparison),
        "evaluation_runs": evaluation_run_rows(comparison),
        "validation": _curve_rows(comparison, [run.validation for run in comparison.runs]),
        "train": _curve_rows(comparison, [run.train for run in comparison.runs]),
    }


def loss_rows(comparison: Comparison) -> list[Row]:
    """Return a row per method at its best learning rate: validation losses over seeds.

    "final" is the loss of the last validation and "best" the lowest; both are means over complete runs with the
    standard deviation over seeds in `_sd`. Differences are taken at the last validation that both sides share.
    """
    contrasts = {
        loss: {contrast.method: contrast for contrast in comparison.contrasts(loss)} for loss in comparison.kind.losses
    }
    rows = []
    for method in comparison.methods:
        runs = method.complete
        row: Row = {
            "method": method.label,
            "baseline": method.baseline.label if method.baseline else "",
            "rate": method.best_rate,
            "rates_tried": len(method.groups),
            "seeds": len({run.seed for run in runs}),
            "unit": comparison.kind.unit,
            "seen": min((run.seen for run in runs), default=0),
        }
        for loss in comparison.kind.losses:
            for corner, value_of in _CORNERS.items():
                values = by_seed(runs, [value_of(run, loss) for run in runs]).values()
                row |= {f"{corner}_{loss}": mean(values), f"{corner}_{loss}_sd": deviation(values)}
            row |= _difference_columns(loss, contrasts[loss].get(method))
        rows.append(row)
    return rows


def run_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run: its validation losses and their differences to the mean of the baseline's best group.

    "is_baseline" marks the only complete run of a baseline, which has no difference.
    """
    return [
        _run_row(comparison, method, group, run)
        for method in comparison.methods
        for group in method.groups
        for run in group.runs
    ]


def rate_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run group: final losses of its complete runs, and the excess over the method's best group."""
    metric = comparison.metric
    rows = []
    for method in comparison.methods:
        best = method.best.mean_loss(metric) if method.best else math.nan
        for group in method.groups:
            values = [*group.final_losses(metric).values()]
            rows.append(
                {
                    "method": method.label,
                    "rate": group.learning_rate,
                    "loss": metric,
                    "seeds": len(values),
                    "mean": mean(values),
                    "sd": deviation(values),
                    "min": min(values, default=math.nan),
                    "max": max(values, default=math.nan),
                    "runs": len(group.runs),
                    "diverged": len(group.diverged),
                    "unfinished": len(group.unfinished),
                    "is_best": group is method.best,
                    "excess": quotient(mean(values) - best, best),
                }
            )
    return rows


def equal_rate_rows(comparison: Comparison) -> list[Row]:
    """Return a row per loss and learning rate that an alternative shares with its baseline."""
    return [
        {
            "method": contrast.method.label,
            "baseline": contrast.method.reference.label,
            "rate": contrast.group.learning_rate,
            "loss": loss,
            "seen": contrast.seen or 0,
            "seeds": len(contrast.losses),
            "baseline_seeds": len(contrast.baseline_losses),
            "mean": contrast.mean,
            "baseline_mean": contrast.baseline_mean,
            **contrast.columns,
        }
        for loss in comparison.kind.losses
        for contrast in comparison.equal_rates(loss)
    ]


def cost_rows(comparison: Comparison) -> list[Row]:
    """Return a row per method: medians over the complete runs of its best group, and their ratios to the baseline.

    Without a complete run, the medians are over the unfinished runs.
    """
    medians = {method: _costs(method.complete or method.best_runs) for method in comparison.methods}
    rows: list[Row] = []
    for method, costs in medians.items():
        runs, baseline = method.complete or method.best_runs, medians[method.reference]
        row: Row = {"method": method.label, "runs": len(runs), "unit": comparison.kind.unit}
        row["device"] = ", ".join(dict.fromkeys(run.device for run in runs))
        for name, value in costs.items():
            row |= {name: value, f"{name}_ratio": quotient(value, baseline[name])}
        rows.append(row | {"mixing_share": quotient(costs["mixing_parameters"], costs["parameters"])})
    return rows


def probe_rows(comparison: Comparison) -> list[Row]:
    """Return a row per measurement and method: accuracy of the runs of its best group, over seeds."""
    rows = []
    kinds = {probe["probe"]: probe["probe_method"] for run in comparison.runs for probe in run.probes}
    for name in sorted(kinds, key=lambda name: ([*_PROBES, kinds[name]].index(kinds[name]), name)):
        measured = {method: _measured(method, name) for method in comparison.methods}
        accuracies = {
            method: by_seed([*own], [probe["accuracy"] for probe in own.values()]) for method, own in measured.items()
        }
        for method, probes in measured.items():
            values = accuracies[method]
            baseline = accuracies[method.baseline] if method.baseline else {}
            gap = difference(values, baseline) if baseline else UNKNOWN
            row: Row = {
                "probe": name,
                "probe_method": kinds[name],
                "method": method.label,
                "rate": method.best_rate,
                "seeds": len(values),
                "accuracy": mean(values.values()),
                "accuracy_sd": deviation(values.values()),
                "top5": mean(probe["top5"] for probe in probes.values()),
                "difference": gap.mean,
                "low_95": gap.low,
                "high_95": gap.high,
                "val_samples": min((probe["val_samples"] for probe in probes.values()), default=0),
            }
            rows += [row] if probes else []
    return rows


def evaluation_rows(comparison: Comparison) -> list[Row]:
    """Return a row per evaluator's measure and method: its last values of the complete runs at the best rate."""
    rows = []
    for name in comparison.evaluations:
        measured = {
            method: [run for run in method.complete if name in run.evaluations] for method in comparison.methods
        }
        values = {
            method: by_seed(runs, [run.evaluations[name]["value"][-1] for run in runs])
            for method, runs in measured.items()
        }
        for method, own in values.items():
            baseline = values[method.baseline] if method.baseline else {}
            gap = difference(own, baseline) if own and baseline else UNKNOWN
            row: Row = {
                "name": name,
                "method": method.label,
                "rate": method.best_rate,
                "seeds": len(own),
                "value": mean(own.values()),
                "value_sd": deviation(own.values()),
                "difference": gap.mean,
                "low_95": gap.low,
                "high_95": gap.high,
            }
            rows += [row] if own else []
    return rows


def evaluation_run_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run, measure and step of what evaluators measured."""
    return [
        {"run": run.label, "name": name, "step": int(step), run.kind.counter: int(seen), "value": value}
        for run in comparison.runs
        for name, rows in run.evaluations.items()
        for step, seen, value in zip(rows["step"], rows[run.kind.counter], rows["value"], strict=True)
    ]


def expert_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run, recorded step and layer with experts."""
    return [
        {"run": run.label} | {key: value for key, value in row.items() if key != "load"}
        for run in comparison.runs
        for row in run.experts
    ]


def expert_load_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run, layer and expert at the last recorded step: its load as a multiple of an even share."""
    return [
        {"run": run.label, "layer": row["layer"], "expert": expert, "load": load}
        for run in comparison.runs
        for row in last_step(run.experts)
        for expert, load in enumerate(row["load"])
    ]


def config_rows(comparison: Comparison) -> list[Row]:
    """Return a row per config key that differs, with a column per method."""
    rows = []
    for key, values in comparison.differing.items():
        if key not in _UNSHOWN_KEYS:
            row: Row = {"key": key, "kind": role(key, values)}
            text = rate if row["kind"] == "peak rate" else show
            for method in comparison.methods:
                row[method.label] = ", ".join(dict.fromkeys(text(values[run.index]) for run in method.runs))
            rows.append(row)
    return rows


def _run_row(comparison: Comparison, method: Method, group: RunGroup, run: Run) -> Row:
    baseline = method.reference.complete
    is_baseline = baseline == [run]
    row: Row = {
        "run": run.label,
        "method": method.label,
        "name": run.name,
        "rate": run.peak_lr,
        "seed": run.seed,
        "is_best": group is method.best,
        "is_baseline": is_baseline,
        "status": run.status,
        "unit": run.kind.unit,
        "seen": run.seen,
    }
    for loss in comparison.kind.losses:
        for corner, value_of in _CORNERS.items():
            value = value_of(run, loss)
            values = by_seed(baseline, [value_of(own, loss) for own in baseline]).values()
            reference = math.nan if is_baseline else mean(values)
            row |= {
                f"{corner}_{loss}": value,
                f"{corner}_{loss}_difference": value - reference,
                f"{corner}_{loss}_relative": quotient(value - reference, reference),
            }
    return row


def _difference_columns(loss: str, contrast: Contrast | None) -> Row:
    columns = contrast.columns if contrast else dict.fromkeys(_DIFFERENCE, math.nan)
    interval = contrast.interval if contrast else UNKNOWN
    kind = "" if math.isnan(interval.low) else "paired t" if interval.paired else "Welch t"
    return {f"{loss}_{name}": value for name, value in columns.items()} | {f"{loss}_interval": kind}


def _costs(runs: list[Run]) -> dict[str, float]:
    return pd.DataFrame([{name: read(run) for name, read in _COSTS.items()} for run in runs]).median().to_dict()


def _curve_rows(comparison: Comparison, curves: list[Columns]) -> list[Row]:
    rows = []
    for run, columns in zip(comparison.runs, curves, strict=True):
        integers = {key: columns[key].astype(int) for key in ("step", run.kind.counter)}
        values = {key: values.tolist() for key, values in (columns | integers).items()}
        rows += [
            {"run": run.label, **dict(zip(values, row, strict=True))} for row in zip(*values.values(), strict=True)
        ]
    return rows


def _reconstruction_rows(comparison: Comparison) -> list[Row]:
    return [
        {"run": run.label, "step": run.reconstructions_step, "key": image.key}
        | {"loss_norm": image.loss_norm, "loss_pixel": image.loss_pixel}
        for run in comparison.runs
        for image in run.reconstructions
    ]


def _measured(method: Method, name: str) -> dict[Run, Row]:
    runs = method.best.runs if method.best else ()
    return {run: probe for run in runs for probe in run.probes if probe["probe"] == name}
