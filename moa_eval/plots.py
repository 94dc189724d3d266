"""The figures: one panel each, drawn by matplotlib without pyplot, every colour a token that the page can retint."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from moa_eval.comparison import Comparison
from moa_eval.runs import Columns, Run

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
_SIZE_INCHES = (4.3, 3.0)
_LEGEND_ROW_INCHES = 0.18
_WARM_UP = 0.1  # the part of the x axis whose losses do not set the y axis: there every loss falls steeply
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


Values = NDArray[np.float64]
Line = tuple[int, Values, Values]  # the run's position, x, y


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


@dataclass(frozen=True)
class _Axis:
    label: str
    values: Callable[[Columns], Values]
    formatter: EngFormatter | None = None


def draw(comparison: Comparison) -> dict[str, Plot]:
    """Draw every figure that these runs have data for, by name."""
    images = _Axis("images seen", lambda rows: rows["samples"], EngFormatter(sep=" "))
    time = _time_axis(comparison.runs)
    plots = [
        _curves(comparison, "validation_loss", "Validation loss, normalized space", "loss_norm", images),
        _differences(comparison, "validation_difference", "Validation loss, difference to the baseline", images),
        _curves(comparison, "validation_loss_pixel", "Validation loss, pixel space", "loss_pixel", images),
        _curves(comparison, "train_loss", "Training loss", None, images),
        _curves(comparison, "validation_loss_time", "Validation loss, normalized space", "loss_norm", time),
        _curves(comparison, "train_loss_time", "Training loss", None, time),
    ]
    return {plot.name: plot for plot in plots if plot is not None}


def smooth(values: Values) -> Values:
    """A centred mean over about a twenty-fifth of the rows (N values in, N out); fewer than 50 rows stay as they are.

    At the ends the window holds only what is there. A value that is not finite stays so and spoils no other.
    """
    half = len(values) // 50
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.where(finite, (total[high] - total[low]) / np.maximum(number[high] - number[low], 1), np.nan)


def _time_axis(runs: tuple[Run, ...]) -> _Axis:
    longest = max(run.wall_s for run in runs)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    return _Axis(f"training time, {unit}", lambda rows: rows["wall_s"] / seconds)


def _curves(comparison: Comparison, name: str, title: str, loss: str | None, axis: _Axis) -> Plot | None:
    """Losses against one axis: a column of the validation rows, or the smoothed training loss."""
    lines = []
    for index, run in enumerate(comparison.runs):
        rows = run.train if loss is None else run.validation
        values = rows["loss" if loss is None else loss]
        if np.isfinite(values).any():
            lines.append((index, axis.values(rows), values))
    if not lines:
        return None

    def fill(axes: Axes) -> None:
        for index, x, y in lines:
            if loss is None and len(y) >= 50:
                axes.plot(x, y, color=_colour(comparison, index), alpha=0.22, linewidth=0.8, gid=f"run-{index}")
                _line(axes, comparison, index, x, smooth(y))
            else:
                _line(axes, comparison, index, x, y, markers=loss is not None)
        _limit(axes, comparison, [(index, x, y if loss else smooth(y)) for index, x, y in lines])
        _legend(axes, comparison, [index for index, _, _ in lines])

    return _render(name, title, axis, fill)


def _differences(comparison: Comparison, name: str, title: str, axis: _Axis) -> Plot | None:
    """Validation loss minus the mean of the baseline's runs, wherever all of those have a validation."""
    loss = comparison.metric
    steady = [run for run in comparison.arms[0].runs if comparison.runs[run].diverged_at is None]
    baseline = [comparison.runs[run].validation for run in steady or comparison.arms[0].runs]
    shared = set.intersection(*(set(rows["samples"]) for rows in baseline))
    reference = {
        samples: np.mean([rows[loss][rows["samples"] == samples][-1] for rows in baseline])
        for samples in sorted(shared)
    }
    lines = []
    for index, run in enumerate(comparison.runs):
        if comparison.arms[0].runs == (index,):
            continue
        at = [row for row, samples in enumerate(run.validation["samples"]) if samples in reference]
        y = run.validation[loss][at] - np.array([reference[run.validation["samples"][row]] for row in at])
        if np.isfinite(y).any():
            lines.append((index, axis.values(run.validation)[at], y))
    if not lines:
        return None

    def fill(axes: Axes) -> None:
        axes.axhline(0, color=_colour(comparison, 0), linewidth=1.4)
        for index, x, y in lines:
            _line(axes, comparison, index, x, y, markers=True)
        _limit(axes, comparison, lines, baseline=0.0)
        _legend(axes, comparison, [0, *(index for index, _, _ in lines)])

    return _render(name, title, axis, fill)


def _line(axes: Axes, comparison: Comparison, run: int, x: Values, y: Values, *, markers: bool = False) -> None:
    arm = comparison.arm_of(run)
    alone = len(comparison.arms[arm].runs) == 1
    axes.plot(
        x, y, color=_colour(comparison, run), gid=f"run-{run}", linestyle=_dash(arm), alpha=1.0 if alone else 0.8,
        linewidth=1.8 if alone else 1.2, marker=MARKERS[arm % len(MARKERS)] if markers else "",
        markersize=4 if alone else 3, markevery=max(1, len(x) // 10),
    )  # fmt: skip


def _limit(axes: Axes, comparison: Comparison, lines: list[Line], baseline: float | None = None) -> None:
    """Fit the y axis to what is of interest: neither the first steep fall nor the peak of a run that diverges.

    A cross at the last finite value marks a run that diverges, at the frame where that value lies outside.
    """
    start = _WARM_UP * max(float(x[-1]) for _, x, _ in lines)
    late = [(run, y[(x >= start) & np.isfinite(y)]) for run, x, y in lines]
    steady = [y for run, y in late if comparison.runs[run].diverged_at is None]
    bounds = [] if baseline is None else [baseline]
    low = np.concatenate([*(y for _, y in late), bounds])
    high = np.concatenate([*steady, bounds]) if any(map(len, steady)) else low
    if not len(low):
        return
    bottom, top = float(low.min()), float(high.max())
    margin = 0.06 * (top - bottom) or 0.01 * abs(top) or 0.01
    axes.set_ylim(bottom - margin, top + margin)
    for run, x, y in lines:
        finite = np.flatnonzero(np.isfinite(y))
        if comparison.runs[run].diverged_at is not None and len(finite):
            at = np.clip(y[finite[-1]], bottom, top)
            axes.plot(
                x[finite[-1]], at, color=_colour(comparison, run), gid=f"run-{run}",
                marker="x", markersize=7, markeredgewidth=1.8,
            )  # fmt: skip


def _legend(axes: Axes, comparison: Comparison, runs: list[int]) -> None:
    """Name the arms between the title and the axes, where no line can run through the names."""
    arms = sorted({comparison.arm_of(run) for run in runs})
    handles, labels = [], []
    for arm in arms:
        colour, marker = PALETTE[arm % len(PALETTE)][0], MARKERS[arm % len(MARKERS)]
        number = len(comparison.arms[arm].runs)
        handles.append(Line2D([], [], color=colour, linestyle=_dash(arm), marker=marker, markersize=4))
        labels.append(comparison.arms[arm].label + (f" ({number} runs)" if number > 1 else ""))
    figure = axes.get_figure(root=True)
    assert figure is not None, "these axes belong to a figure"
    columns = max(1, 56 // (max(map(len, labels)) + 6))
    rows = -(-len(labels) // columns)
    figure.set_figheight(_SIZE_INCHES[1] + _LEGEND_ROW_INCHES * (rows - 1))  # the axes keep their height
    axes.legend(
        handles, labels, ncols=columns, loc="lower left", borderaxespad=0.0, borderpad=0.2, columnspacing=1.6,
        bbox_to_anchor=(0.005, 1.02), bbox_transform=blended_transform_factory(figure.transFigure, axes.transAxes),
    )  # fmt: skip


def _colour(comparison: Comparison, run: int) -> str:
    return PALETTE[comparison.arm_of(run) % len(PALETTE)][0]


def _dash(arm: int) -> Literal["-", "--"]:
    return "-" if arm < len(PALETTE) else "--"


def _render(name: str, title: str, axis: _Axis, fill: Callable[[Axes], None]) -> Plot:
    # The salt makes the ids in the file the same on every run.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        figure.suptitle(title, x=0.01, horizontalalignment="left")
        axes.set_xlabel(axis.label)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        if axis.formatter:
            axes.xaxis.set_major_formatter(axis.formatter)
        axes.set_xlim(left=0)
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
