"""How every figure is drawn: matplotlib without pyplot, every colour a token that the page can retint."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color universal design", slightly darkened where thin lines need it: hues told apart by all
# common kinds of colour vision, each with a lighter twin for a dark background; the first two are furthest apart.
PALETTE = (
    ("#0072b2", "#5db4ea"), ("#d55e00", "#ff9350"), ("#009e73", "#3cc9a0"), ("#b5558f", "#e59cc6"),
    ("#b98300", "#f0b93a"), ("#3f9ad0", "#9bd6f7"), ("#5c6470", "#aeb6c2"),
)  # fmt: skip
MARKERS = "os^DvPX"
INK, MUTED, GRID, PAPER = "#1b1f26", "#666d78", "#e3e6ea", "#fffffe"
TOKENS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    light: f"series-{index}" for index, (light, _) in enumerate(PALETTE)
}

_STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5, "text.color": INK,
    "figure.titlesize": 9.5, "figure.titleweight": "bold",
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.linewidth": 0.8, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "ytick.major.size": 0, "xtick.major.size": 3,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "svg.fonttype": "none",
}  # fmt: skip
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Plot:
    """One figure, drawn.

    Attributes:
        name: File name without its ending, and prefix of every id inside.
        title: What it shows, in words (its text alternative).
        svg: A stand-alone file on light ground.
        inline: The same for the inside of a page: colours are CSS variables (`TOKENS`), and what belongs to a run
            carries data-run="POSITION".
        png: The same as pixels, 200 dots per inch.
    """

    name: str
    title: str
    svg: str
    inline: str
    png: bytes


def render(name: str, title: str, size_inches: tuple[float, float], fill: Callable[[Axes], None]) -> Plot:
    """Draw one panel: `fill` draws into its axes, and may make the figure higher.

    Args:
        name, title: As `Plot` has them.
        size_inches: Width and height.
        fill: Called with the axes.
    """
    # The salt makes the ids in the file the same on every run.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size_inches, layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        figure.suptitle(title, x=0.01, horizontalalignment="left")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(png, format="png", dpi=200)
    return Plot(name, title, svg.getvalue(), _for_page(svg.getvalue(), name, title), png.getvalue())


def _for_page(svg: str, name: str, title: str) -> str:
    """Make a stand-alone SVG part of a page: unique ids, the page's colours, no size, no style rules of its own."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        own = element.get("id", "")
        if own.startswith("run-"):
            element.set("data-run", own.removeprefix("run-"))
            del element.attrib["id"]  # a run may have several lines in one figure
        elif own:
            element.set("id", f"{name}-{own}")
        for key, value in list(element.attrib.items()):
            value = value.replace("url(#", f"url(#{name}-")
            if key == f"{{{_XLINK}}}href":
                del element.attrib[key]
                key, value = "href", value.replace("#", f"#{name}-")
            for colour, token in TOKENS.items():
                value = value.replace(colour, f"var(--{token})")
            element.set(key, value)
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
