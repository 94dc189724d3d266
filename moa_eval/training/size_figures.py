"""Figures of parameters: what more of them are worth at one size, and loss against size."""

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
    """The difference in loss against the parameters added: a point a contender, a bar over its 95 % interval."""
    rows: Rows = []
    for group, row in enumerate(parameter_rows(comparison)):
        gap = row["difference"] if row["baseline"] else 0.0
        if np.isfinite([row["parameters_ratio"], gap]).all():
            low, high = (row[key] if np.isfinite(row[key]) else gap for key in ("low_95", "high_95"))
            place = {"added": short(row["parameters_ratio"] - 1), "difference": short(gap)}
            rows.append({"group": group, "ffn": row["contender"], **place, "low": short(low), "high": short(high)})
    if not rows:
        return None
    labels = [contender.label for contender in comparison.contenders]
    data = alt.Chart(alt.InlineData(values=rows))
    x = alt.X("added:Q").title("parameters, difference to the baseline").axis(format="+.2~%", tickCount=6)
    place: dict[str, Any] = {"x": x, "color": alt.Color("ffn:N").scale(colours(labels))}
    tooltip = [
        alt.Tooltip("ffn:N").title("FFN"),
        alt.Tooltip("added:Q").title("parameters").format("+.3~%"),
        alt.Tooltip("difference:Q").title("loss").format("+.4f"),
    ]
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=INK, strokeWidth=1)
    y = alt.Y("low:Q").title("loss, difference to the baseline")
    layers = [
        zero.encode(y="zero:Q"),
        data.mark_rule(strokeWidth=2, opacity=0.5).encode(**place, y=y, y2=alt.Y2("high:Q")),
        data.mark_point(filled=True, size=70, opacity=1).encode(
            **place, y="difference:Q", shape=alt.Shape("ffn:N").scale(shapes(labels)), tooltip=tooltip
        ),
    ]
    return draw("loss_against_parameters", "Loss against parameters, differences to the baseline", alt.layer(*layers))


def against_size(comparison: Comparison, lines: Sequence[Line]) -> Chart | None:
    """The final loss at each FFN's best rate against its size, both logarithmic, and the fitted lines."""
    if not lines:
        return None
    points: Rows = [
        {
            "group": point.contender, "line": line.label, "label": comparison.contenders[point.contender].label,
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
    tints = [colour(min(point.contender for point in line.points)) for line in lines]
    sizes = [row["parameters"] for row in points]
    losses = [row["loss"] for row in points + fitted]
    x = (
        alt.X("parameters:Q").title(_size_title(comparison)).axis(format="~s", tickCount=5)
        .scale(type="log", nice=False, domain=[min(sizes) / 1.15, max(sizes) * 1.15])
    )  # fmt: skip
    y = (
        alt.Y("loss:Q").title("final validation loss").axis(tickCount=5, format="~g")
        .scale(type="log", nice=False, domain=[min(losses) / 1.01, max(losses) * 1.01])
    )  # fmt: skip
    place: dict[str, Any] = {"x": x, "y": y, "color": alt.Color("line:N").scale(domain=labels, range=tints)}
    tooltip = [
        alt.Tooltip("label:N").title("FFN"),
        alt.Tooltip("text:N").title("of"),
        alt.Tooltip("parameters:Q").format(".4~s"),
        alt.Tooltip("loss:Q").format(".4f"),
    ]
    shape = alt.Shape("line:N").scale(shapes(labels))
    layers = [
        alt.Chart(alt.InlineData(values=fitted)).mark_line(strokeWidth=1.6).encode(**place),
        alt.Chart(alt.InlineData(values=points)).mark_point(filled=True, size=48, opacity=0.75)
        .encode(**place, shape=shape, tooltip=tooltip),
    ]  # fmt: skip
    title = f"Final validation loss against size, {comparison.kind.losses[comparison.metric]}"
    return draw("loss_against_size", title, alt.layer(*layers))


def _size_title(comparison: Comparison) -> str:
    known = any(np.isfinite(run.figure("parameters", "active")) for run in comparison.runs)
    return "parameters that a token passes, embeddings left out" if known else "parameters"
