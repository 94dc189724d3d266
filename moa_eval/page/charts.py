"""Common look of all figures: Altair charts -> PNG files, and interactive Vega-Lite in the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

# Okabe and Ito (2008), "Color universal design": hues that are distinguishable with all common kinds of colour vision,
# slightly darkened for thin lines, each with a lighter twin for dark backgrounds. The first two are furthest apart.
PALETTE = (
    ("#0072b2", "#5db4ea"), ("#d55e00", "#ff9350"), ("#009e73", "#3cc9a0"), ("#b5558f", "#e59cc6"),
    ("#a87600", "#f0b93a"), ("#3f8fc0", "#9bd6f7"), ("#5c6470", "#aeb6c2"), ("#7a4fc4", "#b79cf2"),
)  # fmt: skip
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
INK, MUTED, GRID, PAPER = "#1b1f26", "#666d78", "#e3e2de", "#fffefc"
TOKENS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    own: f"{name}-{index}"
    for index, twins in enumerate(PALETTE)
    for name, own in zip(("series", "twin"), twins, strict=True)
}
"""CSS variable of the page for each colour of a chart."""

AnyChart = alt.Chart | alt.LayerChart | alt.FacetChart

WIDTH, HEIGHT = 560, 260
"""Pixels of the plot in files; in the page, a chart is as wide as its container."""

_PNG_SCALE = 2
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
_TEXT = {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "titleColor": MUTED}
_CONFIG: dict[str, Any] = {
    "font": _FONT,
    "background": PAPER,
    "padding": {"left": 2, "right": 10, "top": 2, "bottom": 2},
    "title": {"anchor": "start", "frame": "group", "fontSize": 13, "fontWeight": 600, "color": INK, "offset": 8},
    "view": {"stroke": None},
    "axis": {
        **_TEXT, "labelColor": MUTED, "domainColor": MUTED, "tickColor": MUTED, "gridColor": GRID,
        "titlePadding": 8, "labelOverlap": True,
    },
    "axisX": {"grid": False, "tickSize": 4},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6, "tickCount": 6},
    "legend": {
        **_TEXT, "title": None, "orient": "top", "labelColor": INK, "labelLimit": 320, "columnPadding": 16,
        "symbolStrokeWidth": 2, "symbolOpacity": 1, "offset": 8,
    },
    "range": {"category": [light for light, _ in PALETTE]},
}  # fmt: skip

# Keeps the rows whose "run" and "group" are not switched off on the page.
_SHOWN = "indexof(hidden, datum.run) < 0 && indexof(hidden_groups, datum.group) < 0"


@dataclass(frozen=True)
class Chart:
    """A drawn figure; `name` is its file name without ending.

    Attributes:
        spec: Vega-Lite with inline data and light colours. Its parameters "hidden" and "hidden_groups" list the runs
            and groups that are switched off; every datum of a run has the run's position as "run", or its group's as
            "group".
        png: PNG on a light background, with the runs that are shown at first.
    """

    name: str
    title: str
    spec: dict[str, Any]
    png: bytes


def draw(name: str, title: str, chart: AnyChart, *, hidden: Sequence[int] = (), height: int = HEIGHT) -> Chart:
    """Draw one panel with the common look and the page's switches; `hidden` runs are switched off at first."""
    spec: dict[str, Any] = {**chart.to_dict(), "title": title, "width": "container", "height": height}
    letters = max((len(label) for view in _views(spec) for label in _legend(view)), default=0)
    columns = {"expr": f"max(1, floor(width / {7 * letters + 36}))"}
    spec["config"] = _CONFIG | {"legend": _CONFIG["legend"] | {"columns": columns}}
    spec["params"] = [
        {"name": "hidden", "value": list(hidden)},
        {"name": "hidden_groups", "value": []},
        *spec.get("params", []),
    ]
    for view in _views(spec):
        if "data" in view:
            view["transform"] = [{"filter": _SHOWN}, *view.get("transform", [])]
    png = vl_convert.vegalite_to_png(spec | {"width": WIDTH}, scale=_PNG_SCALE)
    return Chart(name, title, spec, png)


def colours(labels: Sequence[str], first: int = 0) -> alt.Scale:
    """Return a scale from labels to the colours of the palette, starting at position `first`."""
    return alt.Scale(domain=list(labels), range=[colour(first + index) for index in range(len(labels))])


def colour(index: int) -> str:
    """Return the light colour of a position, modulo the length of the palette."""
    return PALETTE[index % len(PALETTE)][0]


def shapes(labels: Sequence[str]) -> alt.Scale:
    """Return a scale from labels to marker shapes, so that colour is not the only cue.

    Labels that share a colour, since the palette is used up, have different shapes.
    """
    turns = [index + index // len(PALETTE) for index in range(len(labels))]
    return alt.Scale(domain=list(labels), range=[MARKERS[turn % len(MARKERS)] for turn in turns])


def live(chart: Chart) -> str:
    """Return the chart's Vega-Lite as JSON for a script element of the page.

    Colours are CSS variables, "<" is escaped, and the title is omitted, since the page shows it.
    """
    spec = {key: value for key, value in chart.spec.items() if key != "title"}
    text = json.dumps(spec, separators=(",", ":"), ensure_ascii=False)
    for light, token in TOKENS.items():
        text = text.replace(f'"{light}"', f'"var(--{token})"')
    return text.replace("<", "\\u003c")


def javascript() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script (0.9 MB), safe inside a script element."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return re.sub(r"</(?=script)", r"<\/", bundle, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _views(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    for inner in spec.get("layer", ()):
        yield from _views(inner)


def _legend(view: dict[str, Any]) -> list[str]:
    return view.get("encoding", {}).get("color", {}).get("scale", {}).get("domain", [])
