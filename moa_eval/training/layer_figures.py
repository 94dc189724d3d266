"""Figures of the recorded mixing coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moa_eval.page.charts import MUTED, Chart, colours, draw
from moa_eval.training.curves import Rows, short
from moa_eval.training.mixing import STATIC, STATISTICS, Mixing
from moa_eval.training.runs import Run

_FIRST_COLOUR = 6  # position in the palette that no method of a small comparison has


def coefficients_over_depth(run: Run, mixing: Mixing, tints: Mapping[str, str]) -> Chart:
    """Draw every coefficient by layer: its mean and the middle 90 % of the tokens.

    Args:
        run: The run.
        mixing: Its record.
        tints: Colour by term.
    """
    rows = [
        {"run": run.index, "layer": layer.name, "term": term}
        | {key: short(getattr(layer, key)[at]) for key in STATISTICS}
        for layer in mixing.last
        for at, term in enumerate(layer.terms)
    ]
    terms = mixing.terms
    data = alt.Chart(alt.InlineData(values=rows))
    scale = alt.Scale(domain=terms, range=[tints[term] for term in terms])
    place = {
        "x": _layer_axis([layer.name for layer in mixing.last]),
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


def coefficient_spread(run: Run, mixing: Mixing) -> Chart | None:
    """Draw the standard deviation of each layer's coefficients over tokens; return None for a single record."""
    rows = [
        {"layer": layer.name, "part": layer.part, "depth": depth, "seen": short(run.seen_at(step))}
        | {"spread": short(float(np.sqrt(np.mean(np.square(layer.std)))))}
        for step, layers in mixing.steps.items()
        for depth, layer in enumerate(layers)
    ]
    y = alt.Y("spread:Q").title("deviation over tokens")
    static = alt.Chart(alt.InlineData(values=[{"static": STATIC}])).mark_rule(color=MUTED, strokeDash=[4, 3])
    layers = [static.encode(y=alt.Y("static:Q")), *_lines(run, rows, _seen_axis(run), y)]
    title = f"{run.label}: spread of the coefficients over tokens, by layer"
    return draw(f"mixing_training_{run.index}", title, alt.layer(*layers)) if len(mixing.steps) > 1 else None


def _lines(run: Run, rows: Rows, x: alt.X, y: alt.Y, *tooltip: alt.Tooltip) -> list[alt.Chart]:
    """Return a line with points per layer, paler for earlier layers, coloured by the part of the model."""
    parts = [*dict.fromkeys(row["part"] for row in rows)]
    data = alt.Chart(alt.InlineData(values=[{"run": run.index} | row for row in rows]))
    legend: Any = alt.Undefined if len(parts) > 1 else None
    place = {
        "x": x,
        "y": y,
        "color": alt.Color("part:N").scale(colours(parts, _FIRST_COLOUR)).legend(legend),
        "opacity": alt.Opacity("depth:O").scale(range=[0.3, 1]).legend(None),
    }
    values = [alt.Tooltip(own["shorthand"]).title(own["title"]).format(".4~g") for own in (x, y)]
    return [
        data.mark_line(strokeWidth=1.4).encode(**place, detail="layer:N"),
        data.mark_point(filled=True, size=24).encode(**place, tooltip=[alt.Tooltip("layer:N"), *tooltip, *values]),
    ]


def _seen_axis(run: Run) -> alt.X:
    title = f"{run.kind.unit}s seen"
    return alt.X("seen:Q").title(title).axis(format="~s", tickCount=6).scale(nice=False)


def _layer_axis(names: Sequence[str]) -> alt.X:
    parts = [*dict.fromkeys(name.split(".")[0] for name in names)]
    shown = "slice(datum.label, indexof(datum.label, '.') + 1)"  # "0", or "0.shared" for experts of a layer
    title = "layer"
    if len(parts) > 1:
        shown = f"slice(datum.label, 0, 1) + {shown}"
        title = f"layer ({', '.join(f'{part[0]}: {part}' for part in parts)})"
    return alt.X("layer:N").sort(list(names)).title(title).axis(labelAngle=0, labelExpr=shown, labelOverlap="greedy")
