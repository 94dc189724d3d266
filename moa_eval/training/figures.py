"""What the figures of training runs show: losses, peak rates, what the encoders are worth, and how tokens mix."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moa_eval.page import formatting
from moa_eval.page.charts import MUTED, Chart, colours, draw, shapes
from moa_eval.training.comparison import Comparison
from moa_eval.training.curves import CROSS, Axis, Line, Rows, draw_curves, short, smooth
from moa_eval.training.expert_figures import expert_load, router_entropy
from moa_eval.training.experts import Experts
from moa_eval.training.mixing import STATIC, Mixing, term_colours
from moa_eval.training.runs import Run
from moa_eval.training.scaling import Line as SizeLine
from moa_eval.training.seeds import by_seed, mean
from moa_eval.training.size_figures import against_parameters, against_size

_OUTLIER = 6.0  # a mean loss further above the best than so many times the median distance does not set the y axis
_PARTS_COLOUR = 6  # position in the palette of the colours of encoder and decoder, which are no contender's


def draw_all(
    comparison: Comparison, mixing: Mapping[int, Mixing], experts: Mapping[int, Experts], lines: Sequence[SizeLine]
) -> dict[str, Chart]:
    """Draw every figure that these runs have data for, by name.

    Args:
        comparison: The runs.
        mixing: How the tokens of a run mix, by the run's position.
        experts: How they are routed.
        lines: Losses against size.
    """
    return {chart.name: chart for chart in _charts(comparison, mixing, experts, lines) if chart is not None}


def _charts(
    comparison: Comparison, mixing: Mapping[int, Mixing], experts: Mapping[int, Experts], lines: Sequence[SizeLine]
) -> Iterator[Chart | None]:
    counter, unit = comparison.kind.counter, comparison.kind.unit
    seen = Axis(f"{unit}s seen", lambda run, rows: rows[counter])
    flops = Axis("training FLOPs", lambda run, rows: rows[counter] * run.flops_per_unit)
    time = _time_axis(comparison.runs)
    main, *others = comparison.kind.losses
    yield _validation(comparison, "validation_loss", main, seen)
    yield _differences(comparison, main, seen)
    for loss in others:
        yield _validation(comparison, f"validation_{loss}", loss, seen)
    yield _training(comparison, "train_loss", seen)
    yield _validation(comparison, "validation_loss_flops", main, flops)
    yield _validation(comparison, "validation_loss_time", main, time)
    yield _training(comparison, "train_loss_time", time)
    yield _rates(comparison)
    yield against_parameters(comparison)
    yield against_size(comparison, lines)
    yield _probes(comparison)
    for run, own in comparison.of_best_runs(experts).items():
        yield expert_load(comparison, run, own)
        yield router_entropy(comparison, run, own)
    shown = comparison.of_best_runs(mixing)
    for run, own in shown.items():
        yield _mixing_depth(comparison, run, own, term_colours(shown))
        yield _mixing_training(comparison, run, own)


def _time_axis(runs: Sequence[Run]) -> Axis:
    longest = max((run.training_s for run in runs if not math.isnan(run.training_s)), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    return Axis(
        f"training time, {unit}", lambda run, rows: rows[run.counter] / (run.throughput or math.nan) / seconds, "~f"
    )


def _validation(comparison: Comparison, name: str, loss: str, axis: Axis) -> Chart | None:
    lines = [
        Line(index, axis.values(run, run.validation), run.validation[loss]) for index, run in enumerate(comparison.runs)
    ]
    return draw_curves(comparison, name, f"Validation loss, {comparison.kind.losses[loss]}", lines, axis)


def _training(comparison: Comparison, name: str, axis: Axis) -> Chart | None:
    lines = [
        Line(index, axis.values(run, run.train), smooth(run.train["loss"]), run.train["loss"])
        for index, run in enumerate(comparison.runs)
    ]
    return draw_curves(comparison, name, "Training loss", lines, axis)


def _differences(comparison: Comparison, loss: str, axis: Axis) -> Chart | None:
    """Validation loss minus the mean of the baseline's best arm, wherever all of its runs have a validation."""
    lines = []
    for contender, own in enumerate(comparison.contenders):
        reference = comparison.baseline_of(contender).best
        if reference is None:
            continue
        members = comparison.arms[reference].runs
        means = _means(comparison, members, loss)
        for index in (run for arm in own.arms for run in comparison.arms[arm].runs):
            run = comparison.runs[index]
            seen = run.validation[comparison.kind.counter]
            at = [row for row, count in enumerate(seen) if count in means]
            y = run.validation[loss][at] - np.array([means[count] for count in seen[at]])
            if members != (index,):
                lines.append(Line(index, axis.values(run, run.validation)[at], y))
    return draw_curves(
        comparison, "validation_difference", "Validation loss, difference to the baseline", lines, axis, zero=True
    )


def _means(comparison: Comparison, members: Sequence[int], loss: str) -> dict[float, float]:
    """The mean validation loss of some runs, by what was seen, where all that did not diverge have one."""
    steady = [run for run in members if comparison.runs[run].diverged_at is None] or members
    rows = [comparison.runs[run].validation for run in steady]
    counter = comparison.kind.counter
    shared = set.intersection(*(set(own[counter]) for own in rows))
    return {at: mean(own[loss][own[counter] == at][-1] for own in rows) for at in sorted(shared)}


def _rates(comparison: Comparison) -> Chart | None:
    """The final loss against the peak rate: a point a seed, a line a contender through the means over seeds."""
    seeds, arms = _rate_rows(comparison)
    if not any(contender.chosen for contender in comparison.contenders) or not arms:
        return None
    labels = [contender.label for contender in comparison.contenders]
    rates = sorted({arm.rate for arm in comparison.arms})
    x = (
        alt.X("rate:Q").title("peak learning rate")
        .axis(values=rates, labelExpr=_rate_labels(rates), labelOverlap="greedy")
        .scale(type="log", nice=False, domain=[rates[0] / 1.2, rates[-1] * 1.2])
    )  # fmt: skip
    place = {"x": x, "color": alt.Color("ffn:N").scale(colours(labels))}
    inside = {"y": alt.value(alt.ExprRef("scale('y', datum.loss)"))}
    tooltip = [
        alt.Tooltip("label:N").title("rate of"),
        alt.Tooltip("seed:N"),
        alt.Tooltip("text:N").title("final loss"),
    ]
    points, means = (alt.Chart(alt.InlineData(values=rows)) for rows in (seeds, arms))
    shape = alt.Shape("ffn:N").scale(shapes(labels))
    y = alt.Y("low:Q").title("final validation loss").scale(zero=False)
    layers = [
        points.transform_filter("datum.inside").transform_aggregate(low="min(loss)", high="max(loss)")
        .mark_rule(opacity=0).encode(y=y, y2=alt.Y2("high:Q")),
        means.mark_line(clip=True, strokeWidth=1.8).encode(**place, **inside),
        points.transform_filter("datum.inside && !datum.early").mark_point(filled=True, size=36, opacity=0.6)
        .encode(**place, **inside, shape=shape, tooltip=tooltip),
        points.transform_filter("datum.inside && datum.early").mark_point(size=36, strokeWidth=1.5)
        .encode(**place, **inside, shape=shape, tooltip=tooltip),
        means.transform_filter("datum.best").mark_point(size=170, strokeWidth=2)
        .encode(**place, **inside, tooltip=[tooltip[0], alt.Tooltip("text:N").title("lowest mean")]),
        # What lies above the frame, and what has no loss at all, stands at its upper edge, each contender in a row.
        *(points.transform_filter(f"!datum.inside && datum.diverged == {diverged}")
          .mark_point(size=55, strokeWidth=2, shape=mark)
          .encode(**place, y=alt.value(alt.ExprRef("6 + 12 * datum.group")), tooltip=tooltip)
          for diverged, mark in ((1, CROSS), (0, "triangle-up"))),
    ]  # fmt: skip
    title = f"Final validation loss against the peak rate, {comparison.kind.losses[comparison.metric]}"
    return draw("loss_against_rate", title, alt.layer(*layers))


def _rate_rows(comparison: Comparison) -> tuple[Rows, Rows]:
    """A row a run, and a row an arm with a finite mean over its complete runs.

    "group" is the contender; "inside" says that the frame shows a run, "early" that it is unfinished.
    """
    seeds: Rows = []
    arms: Rows = []
    for group, contender in enumerate(comparison.contenders):
        for arm in contender.arms:
            own = comparison.arms[arm]
            row = {"group": group, "ffn": contender.label, "label": own.label, "rate": own.rate}
            seeds += [row | rest for run in own.runs if (rest := _rate_row(comparison, run))]
            complete = [comparison.runs[run] for run in own.runs if not comparison.falls_short(run)]
            finite = [run for run in complete if np.isfinite(_final(run, comparison.metric))]
            if finite:
                centre = mean(by_seed(finite, [_final(run, comparison.metric) for run in finite]).values())
                best = arm == contender.best
                arms.append(row | {"loss": short(centre), "best": best, "text": formatting.loss(centre)})
    limit = _highest_shown([row["loss"] for row in arms])
    for row in seeds:
        row["inside"] = "loss" in row and row["loss"] <= limit
    return seeds, arms


def _rate_row(comparison: Comparison, index: int) -> dict[str, Any] | None:
    """What the figure of rates shows of a run; None before its first validation."""
    run, early = comparison.runs[index], comparison.falls_short(index)
    value = _final(run, comparison.metric)
    row = {"seed": run.seed, "early": early, "diverged": int(np.isnan(value))}
    if run.diverged_at is not None:
        return row | {"text": f"diverged at step {run.diverged_at}"}
    if np.isnan(value):
        return None
    unfinished = f", unfinished: {formatting.grouped(run.seen)} {run.unit}s" if early else ""
    return row | {"loss": short(value), "text": f"{formatting.loss(value)}{unfinished}"}


def _final(run: Run, loss: str) -> float:
    values = run.validation[loss]
    return float(values[-1]) if run.diverged_at is None and len(values) else np.nan


def _highest_shown(means: Sequence[float]) -> float:
    """The highest loss that sets the y axis, so that one bad rate does not flatten the rest."""
    if not means:
        return np.inf
    excess = np.array(means) - min(means)
    return min(means) + _OUTLIER * float(np.median(excess)) if np.median(excess) > 0 else np.inf


def _rate_labels(rates: Sequence[float]) -> str:
    """A Vega expression that writes each rate as the page does."""
    names = ", ".join(f"'{rate!r}': '{formatting.rate(rate)}'" for rate in rates)
    return f"{{{names}}}[toString(datum.value)] || datum.label"


def _probes(comparison: Comparison) -> Chart | None:
    """What encoders are worth beyond the baseline's: a point a run, a bar through the mean of the runs shown."""
    rows = _probe_rows(comparison)
    if len({row["ffn"] for row in rows}) < 2:
        return None
    labels = [contender.label for contender in comparison.contenders]
    order = [name for name in ("knn", "linear", "finetune") if any(row["probe"] == name for row in rows)]
    order += [*dict.fromkeys(row["probe"] for row in rows if row["probe"] not in order)]
    data = alt.Chart(alt.InlineData(values=rows))
    place = {
        "x": alt.X("probe:N").title(None).sort(order).axis(labelAngle=0),
        "xOffset": alt.XOffset("ffn:N").scale(domain=labels),
        "color": alt.Color("ffn:N").scale(colours(labels)),
        "y": alt.Y("points:Q").title("difference to the baseline, points").scale(zero=True),
    }
    tooltip = [
        alt.Tooltip("label:N").title("run"),
        alt.Tooltip("probe:N"),
        alt.Tooltip("accuracy:Q").title("accuracy, %").format(".2f"),
        alt.Tooltip("points:Q").title("difference").format("+.2f"),
    ]
    means = data.transform_aggregate(points="mean(points)", groupby=["ffn", "probe"])
    layers = [
        means.mark_tick(size=18, thickness=2).encode(**place),
        data.mark_point(filled=True, size=40, opacity=0.7).encode(
            **place, shape=alt.Shape("ffn:N").scale(shapes(labels)), tooltip=tooltip
        ),
    ]
    hidden = [run for run in range(len(comparison.runs)) if run not in comparison.shown]
    title = "Accuracy of the encoders, difference to the baseline"
    return draw("probe", title, alt.layer(*layers), hidden=hidden)


def _probe_rows(comparison: Comparison) -> Rows:
    """A row a run and measurement, with its distance in points from the mean of the baseline's best arm."""
    rows: Rows = []
    for index, run in enumerate(comparison.runs):
        contender = comparison.contender_of(index)
        arm = comparison.baseline_of(contender).best
        baseline = [] if arm is None else [comparison.runs[other] for other in comparison.arms[arm].runs]
        for probe in run.probes:
            accuracies = [own.accuracy for other in baseline for own in other.probes if own.name == probe.name]
            if accuracies:
                rows.append(
                    {
                        "run": index,
                        "label": comparison.labels[index],
                        "ffn": comparison.contenders[contender].label,
                        "probe": probe.name,
                        "accuracy": short(100 * probe.accuracy),
                        "points": short(100 * (probe.accuracy - mean(accuracies))),
                    }
                )
    return rows


def _mixing_depth(comparison: Comparison, run: int, mixing: Mixing, tints: Mapping[str, str]) -> Chart:
    """Every coefficient over the depth of the network: its mean, and the middle 90 % of the tokens."""
    rows = [
        {"run": run, "layer": layer.name, "part": layer.part, "term": term}
        | {key: short(getattr(layer, key)[at]) for key in ("mean", "low", "high", "std", "share")}
        for layer in mixing.last
        for at, term in enumerate(layer.terms)
    ]
    own = mixing.terms
    scale = alt.Scale(domain=own, range=[tints[term] for term in own])
    data = alt.Chart(alt.InlineData(values=rows))
    place = {
        "x": _layers([layer.name for layer in mixing.last]),
        "xOffset": alt.XOffset("term:N").sort(own).scale(paddingInner=0.4),
        "color": alt.Color("term:N").sort(own).scale(scale),
    }
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("term:N").title("coefficient of"),
        alt.Tooltip("mean:Q").format(".3f"),
        alt.Tooltip("low:Q").title("5th percentile").format(".3f"),
        alt.Tooltip("high:Q").title("95th percentile").format(".3f"),
        alt.Tooltip("std:Q").title("standard deviation").format(".3f"),
        alt.Tooltip("share:Q").title("share of the sum").format(".1%"),
    ]
    y = alt.Y("low:Q").title("coefficient").scale(zero=False)
    layers = [
        data.mark_rule(strokeWidth=2, opacity=0.45, strokeCap="round").encode(
            **place, y=y, y2=alt.Y2("high:Q"), tooltip=tooltip
        ),
        data.mark_point(filled=True, size=26, opacity=1).encode(**place, y=alt.Y("mean:Q"), tooltip=tooltip),
    ]
    title = f"{comparison.labels[run]}: coefficients over depth, with the middle 90 % of the tokens"
    return draw(f"mixing_depth_{run}", title, alt.layer(*layers))


def _layers(names: Sequence[str]) -> alt.X:
    parts = [*dict.fromkeys(name.split(".")[0] for name in names)]
    shown = "slice(datum.label, indexof(datum.label, '.') + 1)"  # "0", or "0.shared" where experts share a layer
    title = "layer"
    if len(parts) > 1:
        shown = f"slice(datum.label, 0, 1) + {shown}"
        title = f"layer ({', '.join(f'{part[0]}: {part}' for part in parts)})"
    return alt.X("layer:N").sort(list(names)).title(title).axis(labelAngle=0, labelExpr=shown, labelOverlap="greedy")


def _mixing_training(comparison: Comparison, run: int, mixing: Mixing) -> Chart | None:
    """How much a layer's coefficients vary from token to token, during training; None for a single record."""
    rows: Rows = []
    for step, layers in mixing.steps.items():
        seen = comparison.runs[run].seen_at(step)
        for depth, layer in enumerate(layers):
            spread = float(np.sqrt(np.mean(np.square(layer.std))))
            row: dict[str, Any] = {"run": run, "layer": layer.name, "part": layer.part, "depth": depth}
            rows.append(row | {"seen": short(seen), "spread": short(spread)})
    if len(mixing.steps) < 2:
        return None
    parts = [*dict.fromkeys(row["part"] for row in rows)]
    data = alt.Chart(alt.InlineData(values=rows))
    place = {
        "x": alt.X("seen:Q").title(f"{comparison.kind.unit}s seen").axis(format="~s", tickCount=6).scale(nice=False),
        "y": alt.Y("spread:Q").title("deviation over tokens"),
        "color": alt.Color("part:N").scale(colours(parts, _PARTS_COLOUR)),
        "opacity": alt.Opacity("depth:O").scale(range=[0.3, 1]).legend(None),
    }
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("seen:Q").title(f"{comparison.kind.unit}s seen").format(".4~s"),
        alt.Tooltip("spread:Q").title("deviation over tokens").format(".3f"),
    ]
    static = alt.Chart(alt.InlineData(values=[{"static": STATIC}])).mark_rule(color=MUTED, strokeDash=[4, 3])
    layers = [
        static.encode(y=alt.Y("static:Q")),
        data.mark_line(strokeWidth=1.4).encode(**place, detail="layer:N"),
        data.mark_point(filled=True, size=24).encode(**place, tooltip=tooltip),
    ]
    title = f"{comparison.labels[run]}: spread of the coefficients over tokens, layer by layer"
    return draw(f"mixing_training_{run}", title, alt.layer(*layers))
