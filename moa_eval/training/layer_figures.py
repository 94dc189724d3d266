"""Figures of the recorded mixing coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt

from moa_eval.page.charts import Chart, draw
from moa_eval.training.curves import short
from moa_eval.training.mixing import STATISTICS, Mixing
from moa_eval.training.runs import Run


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


def _layer_axis(names: Sequence[str]) -> alt.X:
    parts = [*dict.fromkeys(name.split(".")[0] for name in names)]
    shown = "slice(datum.label, indexof(datum.label, '.') + 1)"  # "0", or "0.shared" for experts of a layer
    title = "layer"
    if len(parts) > 1:
        shown = f"slice(datum.label, 0, 1) + {shown}"
        title = f"layer ({', '.join(f'{part[0]}: {part}' for part in parts)})"
    return alt.X("layer:N").sort(list(names)).title(title).axis(labelAngle=0, labelExpr=shown, labelOverlap="greedy")
