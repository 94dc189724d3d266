"""Figures of expert routing: load of the experts of each layer, and router entropy."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from moa_eval.page.charts import MUTED, Chart, colour, draw
from moa_eval.training.curves import Rows, short
from moa_eval.training.experts import DEAD, OVERLOADED, Experts
from moa_eval.training.runs import Run

_COLOUR = colour(6)


def expert_load(run: Run, experts: Experts) -> Chart:
    """Draw the load of each layer's experts at the last recorded step, sorted by load."""
    rows: Rows = [
        {"run": run.index, "layer": layer.layer, "depth": depth, "rank": rank, "expert": int(expert)}
        | {"load": short(float(layer.relative[expert]))}
        for depth, layer in enumerate(experts.last)
        for rank, expert in enumerate(np.argsort(-layer.relative, kind="stable"), start=1)
    ]
    tooltip = [alt.Tooltip("layer:N"), alt.Tooltip("expert:O"), alt.Tooltip("load:Q").format(".3f")]
    x = alt.X("rank:Q").title("experts by falling load").axis(tickMinStep=1).scale(nice=False, zero=False)
    y = alt.Y("load:Q").title("load, multiples of an even share").scale(zero=True)
    limits: Rows = [{"load": 1, "dashed": 0}, {"load": DEAD, "dashed": 1}, {"load": OVERLOADED, "dashed": 1}]
    dash = alt.when("datum.dashed").then(alt.value([4, 3])).otherwise(alt.value([1, 0]))
    rules = alt.Chart(alt.InlineData(values=limits)).mark_rule(color=MUTED).encode(y="load:Q", strokeDash=dash)
    chart = alt.layer(rules, *_lines(rows, {"x": x, "y": y}, tooltip))
    return draw(f"expert_load_{run.index}", f"{run.label}: load of the experts, by layer", chart)


def router_entropy(run: Run, experts: Experts) -> Chart | None:
    """Draw the entropy of each layer's router during training; return None for a single record."""
    if len(experts.steps) < 2:
        return None
    rows: Rows = [
        {"run": run.index, "layer": layer.layer, "depth": depth, "entropy": short(layer.entropy)}
        | {"seen": short(run.seen_at(step))}
        for step, layers in experts.steps.items()
        for depth, layer in enumerate(layers)
    ]
    title = f"{run.kind.unit}s seen"
    x = alt.X("seen:Q").title(title).axis(format="~s", tickCount=6).scale(nice=False)
    y = alt.Y("entropy:Q").title("router entropy, fraction of the maximum").scale(zero=False)
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("seen:Q").title(title).format(".4~s"),
        alt.Tooltip("entropy:Q").format(".3f"),
    ]
    chart = alt.layer(*_lines(rows, {"x": x, "y": y}, tooltip))
    return draw(f"router_entropy_{run.index}", f"{run.label}: entropy of the routers", chart)


def _lines(rows: Rows, place: dict[str, Any], tooltip: list[alt.Tooltip]) -> list[alt.Chart]:
    """Return a line with points per layer, paler for earlier layers."""
    data = alt.Chart(alt.InlineData(values=rows))
    shade = alt.Opacity("depth:O").scale(range=[0.3, 1]).legend(None)
    return [
        data.mark_line(strokeWidth=1.4, color=_COLOUR).encode(**place, opacity=shade, detail="layer:N"),
        data.mark_point(filled=True, size=22, color=_COLOUR).encode(**place, opacity=shade, tooltip=tooltip),
    ]
