"""Figures of loss against parameters: at one size, and over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from moa_eval.page.charts import INK, Chart, colour, colours, draw, shapes
from moa_eval.training.comparison import Comparison
from moa_eval.training.curves import Rows, short
from moa_eval.training.scaling import Line
from moa_eval.training.tables import parameter_rows


def against_parameters(comparison: Comparison) -> Chart | None:
    """Draw the difference in loss against the additional parameters, a point with its 95 % interval per method."""
    rows: Rows = []
    for group, row in enumerate(parameter_rows(comparison)):
        gap = row["difference"] if row["baseline"] else 0.0
        if np.isfinite([row["parameters_ratio"], gap]).all():
            low, high = (row[key] if np.isfinite(row[key]) else gap for key in ("low_95", "high_95"))
            values = {"added": row["parameters_ratio"] - 1, "difference": gap, "low": low, "high": high}
            rows.append({"group": group, "ffn": row["method"]} | {key: short(own) for key, own in values.items()})
    if not rows:
        return None
    labels = [method.label for method in comparison.methods]
    data = alt.Chart(alt.InlineData(values=rows))
    x = alt.X("added:Q").title("parameters, difference to the baseline").axis(format="+.2~%", tickCount=6)
    y = alt.Y("low:Q").title("loss, difference to the baseline")
    place: dict[str, Any] = {"x": x, "color": alt.Color("ffn:N").scale(colours(labels))}
    shape = alt.Shape("ffn:N").scale(shapes(labels))
    tooltip = [
        alt.Tooltip("ffn:N").title("FFN"),
        alt.Tooltip("added:Q").title("parameters").format("+.3~%"),
        alt.Tooltip("difference:Q").title("loss").format("+.4f"),
    ]
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=INK, strokeWidth=1)
    points = data.mark_point(filled=True, size=70, opacity=1)
    layers = [
        zero.encode(y="zero:Q"),
        data.mark_rule(strokeWidth=2, opacity=0.5).encode(**place, y=y, y2=alt.Y2("high:Q")),
        points.encode(**place, y="difference:Q", shape=shape, tooltip=tooltip),
    ]
    return draw("loss_against_parameters", "Loss against parameters, differences to the baseline", alt.layer(*layers))


def against_size(comparison: Comparison, lines: Sequence[Line]) -> Chart | None:
    """Draw the final loss at the best learning rate against model size, and the fitted lines; both axes are log."""
    if not lines:
        return None
    points: Rows = [
        {
            "group": point.method.index, "line": line.label, "label": point.method.label,
            "parameters": short(point.parameters), "loss": short(loss), "text": f"seed {seed}",
        }
        for line in lines
        for point in line.points
        for seed, loss in point.losses.items()
    ]  # fmt: skip
    fitted: Rows = [
        {"line": line.label, "parameters": short(at), "loss": short(line.loss_at(at))}
        for line in lines
        for at in (line.points[0].parameters, line.points[-1].parameters)
    ]
    labels = [line.label for line in lines]
    tints = [colour(min(point.method.index for point in line.points)) for line in lines]
    sizes = [row["parameters"] for row in points]
    losses = [row["loss"] for row in points + fitted]
    counted = any(np.isfinite(run.number("parameters", "active")) for run in comparison.runs)
    x = (
        alt.X("parameters:Q").title("active parameters without embeddings" if counted else "parameters")
        .axis(format="~s", tickCount=5)
        .scale(type="log", nice=False, domain=[min(sizes) / 1.15, max(sizes) * 1.15])
    )  # fmt: skip
    y = (
        alt.Y("loss:Q").title("final validation loss").axis(tickCount=5, format="~g")
        .scale(type="log", nice=False, domain=[min(losses) / 1.01, max(losses) * 1.01])
    )  # fmt: skip
    place: dict[str, Any] = {"x": x, "y": y, "color": alt.Color("line:N").scale(domain=labels, range=tints)}
    shape = alt.Shape("line:N").scale(shapes(labels))
    tooltip = [
        alt.Tooltip("label:N").title("FFN"),
        alt.Tooltip("text:N").title("run"),
        alt.Tooltip("parameters:Q").format(".4~s"),
        alt.Tooltip("loss:Q").format(".4f"),
    ]
    marks = alt.Chart(alt.InlineData(values=points)).mark_point(filled=True, size=48, opacity=0.75)
    layers = [
        alt.Chart(alt.InlineData(values=fitted)).mark_line(strokeWidth=1.6).encode(**place),
        marks.encode(**place, shape=shape, tooltip=tooltip),
    ]
    title = f"Final validation loss against size, {comparison.kind.losses[comparison.metric]}"
    return draw("loss_against_size", title, alt.layer(*layers))
