"""Figures of routing: how evenly the experts of each layer are used, and how undecided the router is."""

from typing import Any

import altair as alt
import numpy as np

from moa_eval.page.charts import MUTED, Chart, colour, draw
from moa_eval.training.comparison import Comparison
from moa_eval.training.curves import Rows, short
from moa_eval.training.experts import DEAD, OVERLOADED, Experts

_COLOUR = colour(6)  # no contender's, unless there are many


def expert_load(comparison: Comparison, run: int, experts: Experts) -> Chart:
    """Every layer's experts by falling load: a line a layer at the last recorded step, against an even share."""
    rows: Rows = [
        {"run": run, "layer": layer.layer, "depth": depth, "rank": rank, "expert": int(expert)}
        | {"load": short(float(layer.relative[expert]))}
        for depth, layer in enumerate(experts.last)
        for rank, expert in enumerate(np.argsort(-layer.relative, kind="stable"), start=1)
    ]
    tooltip = [alt.Tooltip("layer:N"), alt.Tooltip("expert:O"), alt.Tooltip("load:Q").format(".3f")]
    x = alt.X("rank:Q").title("experts of a layer, by falling load").axis(tickMinStep=1).scale(nice=False, zero=False)
    y = alt.Y("load:Q").title("load, multiples of an even share").scale(zero=True)
    limits: Rows = [{"load": 1, "dashed": 0}, {"load": DEAD, "dashed": 1}, {"load": OVERLOADED, "dashed": 1}]
    chart = alt.layer(_rules(limits), *_lines(rows, {"x": x, "y": y}, tooltip))
    return draw(f"expert_load_{run}", f"{comparison.labels[run]}: load of the experts, layer by layer", chart)


def router_entropy(comparison: Comparison, run: int, experts: Experts) -> Chart | None:
    """The entropy of each layer's router during training; None for a single record."""
    if len(experts.steps) < 2:
        return None
    unit = comparison.kind.unit
    rows: Rows = [
        {"run": run, "layer": layer.layer, "depth": depth, "entropy": short(layer.entropy)}
        | {"seen": short(comparison.runs[run].seen_at(step))}
        for step, layers in experts.steps.items()
        for depth, layer in enumerate(layers)
    ]
    x = alt.X("seen:Q").title(f"{unit}s seen").axis(format="~s", tickCount=6).scale(nice=False)
    y = alt.Y("entropy:Q").title("router entropy, part of the largest").scale(zero=False)
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("seen:Q").title(f"{unit}s seen").format(".4~s"),
        alt.Tooltip("entropy:Q").format(".3f"),
    ]
    chart = alt.layer(*_lines(rows, {"x": x, "y": y}, tooltip))
    return draw(f"router_entropy_{run}", f"{comparison.labels[run]}: entropy of the routers", chart)


def _lines(rows: Rows, place: dict[str, Any], tooltip: list[alt.Tooltip]) -> list[alt.Chart]:
    """A line with points a layer, paler for earlier ones."""
    data = alt.Chart(alt.InlineData(values=rows))
    shade = alt.Opacity("depth:O").scale(range=[0.3, 1]).legend(None)
    return [
        data.mark_line(strokeWidth=1.4, color=_COLOUR).encode(**place, opacity=shade, detail="layer:N"),
        data.mark_point(filled=True, size=22, color=_COLOUR).encode(**place, opacity=shade, tooltip=tooltip),
    ]


def _rules(limits: Rows) -> alt.Chart:
    dash = alt.when("datum.dashed").then(alt.value([4, 3])).otherwise(alt.value([1, 0]))
    return alt.Chart(alt.InlineData(values=limits)).mark_rule(color=MUTED).encode(y="load:Q", strokeDash=dash)
