"""How every figure is drawn: Vega-Lite by Altair, as files without a browser and alive in the page."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

# Okabe and Ito (2008), "Color universal design", slightly darkened where thin lines need it: hues told apart by all
# common kinds of colour vision, each with a lighter twin for a dark background; the first two are furthest apart.
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
}  # colour of a chart -> CSS variable of the page that stands for it

AnyChart = alt.Chart | alt.LayerChart | alt.FacetChart  # the last because `alt.layer` says that it may return one

POINTER = "pointer"  # what the names of layers begin with that only a pointer brings out; files do without them
WIDTH, HEIGHT = 560, 260  # pixels of the plot in the files; in the page a chart is as wide as its place
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

# Rows of run number "run", or of group number "group", are left out while a switch of the page says so.
_SHOWN = "indexof(hidden, datum.run) < 0 && indexof(hidden_groups, datum.group) < 0"


@dataclass(frozen=True)
class Chart:
    """One figure, drawn.

    Attributes:
        name: File name without its ending.
        title: What it shows, in words (its text alternative).
        spec: Vega-Lite with its data inside and light colours. Its parameters "hidden" and "hidden_groups" list the
            runs and the groups of runs that are switched off; every datum that belongs to a run carries the run's
            position as "run", or its group's as "group".
        svg: A stand-alone file on light ground, with the runs that are shown at first.
        png: The same as pixels.
    """

    name: str
    title: str
    spec: dict[str, Any]
    svg: str
    png: bytes


def draw(name: str, title: str, chart: AnyChart, *, hidden: Sequence[int] = (), height: int = HEIGHT) -> Chart:
    """Give a chart its title, the common look and the switches, and draw it.

    Args:
        name, title: As `Chart` has them.
        chart: One panel, with its data inside; a layer whose name begins with `POINTER` is for the page alone.
        hidden: Runs that are switched off at first.
        height: Pixels between the axes.
    """
    spec: dict[str, Any] = {
        **chart.to_dict(),
        "title": title,
        "width": "container",
        "height": height,
    }
    letters = max((len(label) for view in _views(spec) for label in _legend(view)), default=0)
    columns = {"expr": f"max(1, floor(width / {7 * letters + 36}))"}  # as many as fit
    spec["config"] = _CONFIG | {"legend": _CONFIG["legend"] | {"columns": columns}}
    spec["params"] = [
        {"name": "hidden", "value": list(hidden)},
        {"name": "hidden_groups", "value": []},
        *spec.get("params", []),
    ]
    for view in _views(spec):
        if "data" in view:
            view["transform"] = [{"filter": _SHOWN}, *view.get("transform", [])]
    svg = _renumbered(vl_convert.vegalite_to_svg(_unpointed(spec) | {"width": WIDTH}))
    return Chart(name, title, spec, svg, vl_convert.svg_to_png(svg, scale=_PNG_SCALE))


def colours(labels: Sequence[str], first: int = 0) -> alt.Scale:
    """A scale from labels to the palette in order, beginning with its colour number `first`."""
    return alt.Scale(domain=list(labels), range=[colour(first + index) for index in range(len(labels))])


def colour(index: int) -> str:
    """The light colour of a position; positions beyond the palette begin again."""
    return PALETTE[index % len(PALETTE)][0]


def shapes(labels: Sequence[str]) -> alt.Scale:
    """A scale from labels to marker shapes in order, so that no reader depends on colours."""
    return alt.Scale(domain=list(labels), range=[MARKERS[index % len(MARKERS)] for index in range(len(labels))])


def live(chart: Chart) -> str:
    """The chart's Vega-Lite as JSON for the inside of a page.

    Colours are CSS variables, "<" is escaped, and the title is left to the page, where it can wrap.
    """
    spec = {key: value for key, value in chart.spec.items() if key != "title"}
    return _retint(json.dumps(spec, separators=(",", ":"), ensure_ascii=False)).replace("<", "\\u003c")


def still(chart: Chart, prefix: str) -> str:
    """The chart's SVG for the inside of a page: as wide as its place, colours are CSS variables, ids are unique.

    Args:
        chart: The chart.
        prefix: What all ids in it begin with.
    """
    svg = re.sub(r'\bid="', f'id="{prefix}', chart.svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'\bxlink:href="#', f'href="#{prefix}', svg)
    return _retint(svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(chart.title)}" ', 1))


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script for the inside of a page (0.9 MB; seconds the first time)."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return re.sub(r"</(?=script)", r"<\/", bundle, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _views(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    for inner in spec.get("layer", ()):
        yield from _views(inner)


def _legend(view: dict[str, Any]) -> list[str]:
    return view.get("encoding", {}).get("color", {}).get("scale", {}).get("domain", [])


def _unpointed(spec: dict[str, Any]) -> dict[str, Any]:
    """The chart without what only the pointer brings out: thousands of marks in a file that no pointer reaches."""
    if "layer" not in spec:
        return spec
    layers = [view for view in spec["layer"] if not view.get("name", "").startswith(POINTER)]
    params = [param for param in spec["params"] if "views" not in param]
    return spec | {"layer": layers, "params": params}


def _renumbered(svg: str) -> str:
    """The same SVG whatever was drawn before it: its ids carry a counter of the whole process."""
    ids = {old: f"part{number}" for number, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    return re.sub(r'(\bid="|url\(#|href="#)([^")]+)', lambda match: match[1] + ids.get(match[2], match[2]), svg)


def _retint(text: str) -> str:
    for light, token in TOKENS.items():
        text = text.replace(f'"{light}"', f'"var(--{token})"')
    return text


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
