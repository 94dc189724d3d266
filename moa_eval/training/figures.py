"""Figures of a comparison: loss curves, learning rates, mixing coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moa_eval.page import formatting
from moa_eval.page.charts import MUTED, Chart, colours, draw, shapes
from moa_eval.training.comparison import Comparison, RunGroup
from moa_eval.training.curves import CROSS, Axis, Line, Rows, Values, draw_curves, short, smooth
from moa_eval.training.intervals import mean
from moa_eval.training.mixing import STATISTICS, Mixing
from moa_eval.training.mixing_maps import shown_mixing, term_colours
from moa_eval.training.runs import Columns, Run

_OUTLIER = 6.0  # median distances above the best mean loss, where the y axis of the learning rates ends


def draw_all(comparison: Comparison) -> dict[str, Chart]:
    """Draw every figure that the runs have data for, by name."""
    return {chart.name: chart for chart in _charts(comparison) if chart is not None}


def _charts(comparison: Comparison) -> Iterator[Chart | None]:
    counter, unit = comparison.kind.counter, comparison.kind.unit
    seen = Axis(f"{unit}s seen", lambda run, rows: rows[counter])
    flops = Axis("training FLOPs", lambda run, rows: rows[counter] * run.flops_per_unit)
    time = _time_axis(comparison.runs)
    main, *others = comparison.kind.losses
    yield _intervals(comparison)
    yield _validation(comparison, "validation_loss", main, seen)
    yield _differences(comparison, main, seen)
    for loss in others:
        yield _validation(comparison, f"validation_{loss}", loss, seen)
    yield _training(comparison, "train_loss", seen)
    yield _validation(comparison, "validation_loss_flops", main, flops)
    yield _validation(comparison, "validation_loss_time", main, time)
    yield _training(comparison, "train_loss_time", time)
    yield from _evaluations(comparison, seen)
    yield _rates(comparison)
    mixing = shown_mixing(comparison)
    for run, own in mixing:
        yield _coefficients(run, own, term_colours(mixing))


def _time_axis(runs: Sequence[Run]) -> Axis:
    longest = max((run.training_s for run in runs if not math.isnan(run.training_s)), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)

    def values(run: Run, rows: Columns) -> Values:
        return rows[run.kind.counter] / (run.throughput or math.nan) / seconds

    return Axis(f"training time, {unit}", values, "~f")


def _validation(comparison: Comparison, name: str, loss: str, axis: Axis) -> Chart | None:
    lines = [Line(run, axis.values(run, run.validation), run.validation[loss]) for run in comparison.runs]
    return draw_curves(comparison, name, f"Validation loss, {comparison.kind.losses[loss]}", lines, axis)


def _evaluations(comparison: Comparison, axis: Axis) -> Iterator[Chart | None]:
    """Draw what evaluators measured, a figure for each name with several steps."""
    for number, name in enumerate(comparison.evaluations):
        measured = [(run, run.evaluations[name]) for run in comparison.runs if name in run.evaluations]
        if all(len(rows["step"]) < 2 for _, rows in measured):
            continue
        lines = [Line(run, axis.values(run, rows), rows["value"]) for run, rows in measured]
        yield draw_curves(comparison, f"evaluation_{number}", name, lines, axis, y_title=name)


def _training(comparison: Comparison, name: str, axis: Axis) -> Chart | None:
    lines = [Line(run, axis.values(run, run.train), smooth(run.train["loss"])) for run in comparison.runs]
    return draw_curves(comparison, name, "Training loss, moving average", lines, axis)


def _differences(comparison: Comparison, loss: str, axis: Axis) -> Chart | None:
    """Draw validation loss minus the mean of the baseline's best group, where all its runs have a validation."""
    lines = []
    for method in comparison.methods:
        if (baseline := method.reference.best) is None:
            continue
        means = _baseline_means(baseline, loss)
        for run in method.runs:
            if baseline.runs != (run,):
                shared = np.isin(run.validation[run.kind.counter], [*means])
                rows = {key: values[shared] for key, values in run.validation.items()}
                difference = rows[loss] - np.array([means[seen] for seen in rows[run.kind.counter]])
                lines.append(Line(run, axis.values(run, rows), difference))
    title = "Validation loss, difference to the baseline"
    return draw_curves(comparison, "validation_difference", title, lines, axis, is_difference=True)


def _baseline_means(group: RunGroup, loss: str) -> dict[float, float]:
    """Return the mean validation loss of a group's steady runs, by images or tokens that all of them have."""
    runs = [run for run in group.runs if run.diverged_at is None] or group.runs
    shared = set.intersection(*(set(run.validation[run.kind.counter]) for run in runs))
    return {seen: mean(run.loss_at(loss, seen) for run in runs) for seen in sorted(shared)}


def _intervals(comparison: Comparison) -> Chart | None:
    """Draw each alternative's final loss minus its baseline's: the mean, its interval and the paired seeds."""
    contrasts = [c for c in comparison.contrasts(comparison.metric) if math.isfinite(c.interval.low)]
    if len(contrasts) < 2:  # a single one is in the verdict
        return None
    contrasts.sort(key=lambda contrast: contrast.interval.mean)
    means, seeds = [], []
    for contrast in contrasts:
        row = {"group": contrast.method.index, "ffn": contrast.method.label}
        gap = contrast.interval
        words = f"{formatting.signed(gap.mean)} ({formatting.signed(gap.low)} to {formatting.signed(gap.high)})"
        means.append(row | {key: short(getattr(gap, key)) for key in ("mean", "low", "high")} | {"text": words})
        pairs = contrast.losses.keys() & contrast.baseline_losses.keys() if gap.paired else ()
        seeds += [
            row | {"seed": seed, "value": short(contrast.losses[seed] - contrast.baseline_losses[seed])}
            for seed in sorted(pairs)
        ]
    labels = [method.label for method in comparison.methods]
    y = alt.Y("ffn:N").sort([row["ffn"] for row in means]).title(None).axis(labelLimit=220, grid=False)
    low, x = (
        alt.X(f"{key}:Q").title("difference to the baseline, 95 % interval").scale(zero=True).axis(grid=True)
        for key in ("low", "mean")
    )
    place = {"y": y, "color": alt.Color("ffn:N").scale(colours(labels)).legend(None)}
    tooltip = [alt.Tooltip("ffn:N"), alt.Tooltip("text:N").title("difference")]
    data, points = (alt.Chart(alt.InlineData(values=rows)) for rows in (means, seeds))
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3], color=MUTED)
    layers = [
        zero.encode(x="zero:Q"),
        data.mark_rule(strokeWidth=2.5, strokeCap="round").encode(**place, x=low, x2="high:Q", tooltip=tooltip),
        points.mark_point(size=26, opacity=0.6).encode(
            **place, x="value:Q", tooltip=[tooltip[0], "seed:N", alt.Tooltip("value:Q").title("difference")]
        ),
        data.mark_point(filled=True, size=70, opacity=1).encode(**place, x=x, tooltip=tooltip),
    ]
    title = f"Difference in final validation loss, {comparison.kind.losses[comparison.metric]}"
    return draw("loss_difference", title, alt.layer(*layers), height=40 + 26 * len(means))


def _rates(comparison: Comparison) -> Chart | None:
    """Draw the final loss against the peak learning rate: a point per run, a line through each method's means."""
    runs, means = _rate_points(comparison)
    if not comparison.tuned or not means:
        return None
    labels = [method.label for method in comparison.methods]
    rates = sorted({group.learning_rate for group in comparison.groups})
    x = (
        alt.X("rate:Q").title("peak learning rate")
        .axis(values=rates, labelExpr=_rate_labels(rates), labelOverlap="greedy")
        .scale(type="log", nice=False, domain=[rates[0] / 1.2, rates[-1] * 1.2])
    )  # fmt: skip
    y = (
        alt.Y("loss:Q")
        .title("final validation loss")
        .scale(zero=False, clamp=True, domainMax=_upper_limit(runs, means))
    )
    place = {"x": x, "y": y, "color": alt.Color("ffn:N").scale(colours(labels))}
    tooltip = [
        alt.Tooltip("label:N").title("run group"),
        alt.Tooltip("seed:N"),
        alt.Tooltip("text:N").title("final loss"),
    ]
    points, lines = (alt.Chart(alt.InlineData(values=rows)) for rows in (runs, means))
    finite = points.transform_filter("!datum.diverged")
    marked = place | {"shape": alt.Shape("ffn:N").scale(shapes(labels)), "tooltip": tooltip}
    at_the_edge = place | {"y": alt.value(alt.ExprRef("6 + 12 * datum.group"))}  # a row per method
    layers = [
        lines.mark_line(strokeWidth=1.8).encode(**place),
        finite.transform_filter("!datum.early").mark_point(filled=True, size=36, opacity=0.6).encode(**marked),
        finite.transform_filter("datum.early").mark_point(size=36, strokeWidth=1.5).encode(**marked),
        lines.transform_filter("datum.best").mark_point(size=170, strokeWidth=2)
        .encode(**place, tooltip=[tooltip[0], alt.Tooltip("text:N").title("lowest mean")]),
        points.transform_filter("datum.diverged").mark_point(size=55, strokeWidth=2, shape=CROSS)
        .encode(**at_the_edge, tooltip=tooltip),
    ]  # fmt: skip
    title = f"Final validation loss against the peak learning rate, {comparison.kind.losses[comparison.metric]}"
    return draw("loss_against_rate", title, alt.layer(*layers))


def _rate_points(comparison: Comparison) -> tuple[Rows, Rows]:
    """Return a row per run ("early" if it is unfinished), and a row per group with complete runs."""
    runs: Rows = []
    means: Rows = []
    for method in comparison.methods:
        for group in method.groups:
            row = {"group": method.index, "ffn": method.label, "label": group.label, "rate": group.learning_rate}
            shown = [run for run in group.runs if run.is_validated or run.diverged_at is not None]
            runs += [row | _rate_point(comparison, group, run) for run in shown]
            if group.complete:
                loss = group.mean_loss(comparison.metric)
                best = group is method.best
                means.append(row | {"loss": short(loss), "best": best, "text": formatting.loss(loss)})
    return runs, means


def _rate_point(comparison: Comparison, group: RunGroup, run: Run) -> dict[str, Any]:
    early = run in group.unfinished
    row = {"seed": run.seed, "early": early, "diverged": int(run.diverged_at is not None)}
    if run.diverged_at is not None:
        return row | {"text": f"diverged at step {run.diverged_at}"}
    unfinished = f", unfinished: {formatting.grouped(run.seen)} {run.kind.unit}s" if early else ""
    loss = run.final(comparison.metric)
    return row | {"loss": short(loss), "text": f"{formatting.loss(loss)}{unfinished}"}


def _upper_limit(runs: Rows, means: Rows) -> float:
    """Return the end of the y axis, so that one bad rate does not flatten the others."""
    losses = np.array([row["loss"] for row in means])
    excess = float(np.median(losses - losses.min()))
    highest = max(row["loss"] for row in runs if "loss" in row)
    return min(highest, float(losses.min()) + _OUTLIER * excess) if excess > 0 else highest


def _rate_labels(rates: Sequence[float]) -> str:
    """Return a Vega expression that formats each rate like the page."""
    names = ", ".join(f"'{rate!r}': '{formatting.rate(rate)}'" for rate in rates)
    return f"{{{names}}}[toString(datum.value)] || datum.label"


def _coefficients(run: Run, mixing: Mixing, tints: Mapping[str, str]) -> Chart:
    """Draw every coefficient by layer: its mean and the middle 90 % of the tokens; `tints` has a colour per term."""
    rows = [
        {"run": run.index, "layer": row["layer"], "term": row["coefficient"]}
        | {key: short(row[key]) for key in STATISTICS}
        for row in mixing.last
    ]
    terms = mixing.terms
    data = alt.Chart(alt.InlineData(values=rows))
    scale = alt.Scale(domain=terms, range=[tints[term] for term in terms])
    place = {
        "x": _layer_axis([*dict.fromkeys(row["layer"] for row in mixing.last)]),
        "xOffset": alt.XOffset("term:N").sort(terms).scale(paddingInner=0.4),
        "color": alt.Color("term:N").sort(terms).scale(scale),
    }
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("term:N"),
        alt.Tooltip("mean:Q").format(".3f"),
        alt.Tooltip("low:Q").title("5th percentile").format(".3f"),
        alt.Tooltip("high:Q").title("95th percentile").format(".3f"),
        alt.Tooltip("std:Q").title("standard deviation").format(".3f"),
        alt.Tooltip("share:Q").title("share of the sum").format(".1%"),
    ]
    y = alt.Y("low:Q").title("coefficient").scale(zero=False)
    bars = data.mark_rule(strokeWidth=2, opacity=0.45, strokeCap="round")
    layers = [
        bars.encode(**place, y=y, y2=alt.Y2("high:Q"), tooltip=tooltip),
        data.mark_point(filled=True, size=26, opacity=1).encode(**place, y=alt.Y("mean:Q"), tooltip=tooltip),
    ]
    title = f"{run.label}: coefficients over depth, with the middle 90 % of the tokens"
    return draw(f"mixing_depth_{run.index}", title, alt.layer(*layers))


def _layer_axis(names: Sequence[str]) -> alt.X:
    parts = [*dict.fromkeys(name.split(".")[0] for name in names)]
    shown = "slice(datum.label, indexof(datum.label, '.') + 1)"  # "0", or "0.shared" for experts of a layer
    title = "layer"
    if len(parts) > 1:
        shown = f"slice(datum.label, 0, 1) + {shown}"
        title = f"layer ({', '.join(f'{part[0]}: {part}' for part in parts)})"
    return alt.X("layer:N").sort(list(names)).title(title).axis(labelAngle=0, labelExpr=shown, labelOverlap="greedy")
