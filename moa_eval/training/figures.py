"""What the figures show: losses against images and time, and accuracies with their intervals; one panel each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from moa_eval.page.charts import GRID, INK, MARKERS, PALETTE, Plot, render
from moa_eval.training.comparison import Comparison
from moa_eval.training.runs import Columns, Run

_SIZE_INCHES = (4.3, 3.0)
_LEGEND_ROW_INCHES = 0.18
_WARM_UP = 0.1  # the part of the x axis whose losses do not set the y axis: there every loss falls steeply
_Z_95 = 1.959964  # half the width of a normal 95 % interval, in standard errors

Values = NDArray[np.float64]
Line = tuple[int, Values, Values]  # the run's position, x, y


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


def accuracies(rows: Sequence[str], labels: Sequence[str], values: Values, errors: Values, name: str) -> Plot:
    """Accuracies of several models in several tasks, as points with their normal 95 % intervals.

    Args:
        rows: What to call each task, from top to bottom.
        labels: What to call each model; the first is the baseline.
        values, errors: Percent (tasks, models), the standard errors NaN where unknown.
        name: The figure's name.
    """
    title = "Accuracy, with 95 % intervals over items"
    spread = 0.6 if len(labels) > 1 else 0.0
    offsets = np.linspace(-spread / 2, spread / 2, len(labels))

    def fill(axes: Axes) -> None:
        handles = []
        for model in range(len(labels)):
            colour, marker = PALETTE[model % len(PALETTE)][0], MARKERS[model % len(MARKERS)]
            at = np.arange(len(rows)) + offsets[model]
            half = _Z_95 * np.nan_to_num(errors[:, model])
            axes.hlines(at, values[:, model] - half, values[:, model] + half, colors=colour, gid=f"run-{model}")
            look = {"color": colour, "linestyle": "", "marker": marker, "markersize": 5}
            axes.plot(values[:, model], at, gid=f"run-{model}", **look)
            handles.append(Line2D([], [], **look))
        for row in range(1, len(rows)):
            axes.axhline(row - 0.5, color=GRID, linewidth=0.8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows, color=INK)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("accuracy, %")
        _place_legend(axes, handles, list(labels))

    height = 0.95 + len(rows) * (0.2 + 0.14 * len(labels))
    return render(name, title, (_SIZE_INCHES[0], height), fill)


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

    return _draw(name, title, axis, fill)


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

    return _draw(name, title, axis, fill)


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
    _place_legend(axes, handles, labels)


def _place_legend(axes: Axes, handles: list[Line2D], labels: list[str]) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None, "these axes belong to a figure"
    columns = max(1, 56 // (max(map(len, labels)) + 6))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_INCHES * (rows - 1))  # the axes keep their height
    axes.legend(
        handles, labels, ncols=columns, loc="lower left", borderaxespad=0.0, borderpad=0.2, columnspacing=1.6,
        bbox_to_anchor=(0.005, 1.02), bbox_transform=blended_transform_factory(figure.transFigure, axes.transAxes),
    )  # fmt: skip


def _colour(comparison: Comparison, run: int) -> str:
    return PALETTE[comparison.arm_of(run) % len(PALETTE)][0]


def _dash(arm: int) -> Literal["-", "--"]:
    return "-" if arm < len(PALETTE) else "--"


def _draw(name: str, title: str, axis: _Axis, fill: Callable[[Axes], None]) -> Plot:
    def fill_and_scale(axes: Axes) -> None:
        fill(axes)
        axes.set_xlabel(axis.label)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        if axis.formatter:
            axes.xaxis.set_major_formatter(axis.formatter)
        axes.set_xlim(left=0)

    return render(name, title, _SIZE_INCHES, fill_and_scale)
