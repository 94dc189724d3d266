"""Loss curves: one line per run, with a y axis that fits the interesting part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moa_eval.page import formatting
from moa_eval.page.charts import INK, Chart, colours, draw, shapes
from moa_eval.training.comparison import Comparison
from moa_eval.training.runs import Columns, Run

CROSS = "M-1,-1L1,1M-1,1L1,-1"
"""Marker of a diverged run."""

_WARM_UP = 0.1  # fraction of the x axis whose losses do not set the y axis, since every loss falls steeply there
_POINTS = 4000  # of all lines of a figure, so that a page of many long runs stays small
_FEWEST_POINTS, _MOST_POINTS = 60, 250  # of one line
_MARKED_POINTS = 25  # a line of at most that many points has markers
_AT = "scale('y', datum.y)"  # pixels from the upper edge
_HELD = f"clamp({_AT}, 0, height)"  # a mark outside the frame would stretch the figure
_VISIBLE = f"inrange({_AT}, [0, height])"
_PLAIN_ZERO = "datum.value === 0 ? '0' : datum.label"  # instead of "0k"

Values = NDArray[np.float64]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Axis:
    """The x axis: its label, its values for the rows of a run, and its number format."""

    label: str
    values: Callable[[Run, Columns], Values]
    format: str = "~s"


@dataclass(frozen=True, eq=False)
class Line:
    """A run's line: x and y (N values each), and the recorded y if y is smoothed."""

    run: Run
    x: Values
    y: Values
    raw: Values | None = None


def smooth(values: Values) -> Values:
    """Return a centred moving average over about a twenty-fifth of the values; NaN stays and affects no neighbour.

    The window is cut off at the ends. Fewer than 50 values are returned unchanged.
    """
    finite = np.isfinite(values)
    series = pd.Series(np.where(finite, values, np.nan))
    averaged = series.rolling(2 * (len(values) // 50) + 1, center=True, min_periods=1).mean()
    return np.where(finite, averaged, np.nan)


def draw_curves(
    comparison: Comparison, name: str, title: str, lines: Sequence[Line], axis: Axis, *, is_difference: bool = False
) -> Chart | None:
    """Draw losses against an axis; return None if no value is finite.

    The y axis ignores the steep beginning and the peak of a diverging run. A cross marks the last finite value of a
    diverged run, at the edge of the frame if that value is outside.

    Args:
        comparison: The runs.
        name: Name of the chart.
        title: Title of the chart.
        lines: Lines to draw.
        axis: The x axis.
        is_difference: Whether y is a difference, which gets a line at zero.
    """
    lines = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not lines:
        return None
    points = _points(lines)
    y_title = "difference" if is_difference else "loss"
    x = alt.X("x:Q").title(axis.label).axis(format=axis.format, labelExpr=_PLAIN_ZERO, tickCount=6).scale(nice=False)
    place = {"x": x, "color": alt.Color("ffn:N").scale(colours(_labels(comparison)))}
    tooltip = [
        alt.Tooltip("label:N").title("run"),
        alt.Tooltip("x:Q").title(axis.label).format(".4~s" if axis.format == "~s" else ".4~g"),
        alt.Tooltip("y:Q").title(y_title).format(".5~g"),
    ]
    layers = [_frame(points, y_title)]
    if is_difference:
        zero = alt.Chart(alt.InlineData(values=[{"zero": 0}]))
        layers.append(zero.mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q"))
    if raw := _raw_points(lines):
        pale = _named(comparison, raw).mark_line(clip=True, strokeWidth=0.8, opacity=0.25)
        layers.append(pale.encode(**place, y=_pixels(_AT), detail=["run:N", "part:N"]))
    layers.append(_strong_lines(comparison, points, place))
    if max(Counter(row["run"] for row in points).values()) <= _MARKED_POINTS:
        marks = _named(comparison, points).mark_point(filled=True, size=32)
        shape = alt.Shape("ffn:N").scale(shapes(_labels(comparison)))
        layers.append(marks.encode(**place, y=_pixels(_HELD), shape=shape, opacity=_pixels(f"{_VISIBLE} ? 0.9 : 0")))
    hover = _named(comparison, points).mark_point(filled=True, size=60, opacity=0)
    layers.append(hover.encode(**place, y=_pixels(_HELD), tooltip=tooltip))
    if ends := _diverged_ends(lines):
        marks = _named(comparison, ends).mark_point(shape=CROSS, size=60, strokeWidth=2)
        diverged = [tooltip[0], alt.Tooltip("diverged:N").title("diverged at step")]
        layers.append(marks.encode(**place, y=_pixels(_HELD), tooltip=diverged))
    return draw(name, title, alt.layer(*layers), hidden=comparison.hidden)


def short(value: float) -> float:
    """Round a value to the digits that a figure can show."""
    return float(f"{value:.6g}")


def _labels(comparison: Comparison) -> list[str]:
    return [method.label for method in comparison.methods]


def _frame(points: Rows, title: str) -> alt.Chart:
    """Return the only layer with a y axis. The others follow its scale and are clipped."""
    fitted = alt.Chart(alt.InlineData(values=points)).transform_filter("!datum.early")
    y = alt.Y("low:Q").title(title).scale(zero=False)
    return fitted.transform_aggregate(low="min(y)", high="max(y)").mark_rule(opacity=0).encode(y=y, y2=alt.Y2("high:Q"))


def _pixels(expression: str) -> Any:
    """Return a value that follows the y scale without extending it."""
    return alt.value(alt.ExprRef(expression))


def _strong_lines(comparison: Comparison, points: Rows, place: dict[str, Any]) -> alt.Chart:
    """Return the lines: solid at a method's best learning rate, dashed at others."""
    width = 1.4 if any(len(group.runs) > 1 for group in comparison.groups) else 1.8
    dash = alt.when("datum.best").then(alt.value([1, 0])).otherwise(alt.value([4, 3]))
    lines = _named(comparison, points).mark_line(clip=True, strokeWidth=width, strokeCap="round")
    return lines.encode(**place, y=_pixels(_AT), strokeDash=dash, detail=["run:N", "part:N"])


def _named(comparison: Comparison, rows: Rows) -> alt.Chart:
    """Return a chart whose rows get the run's label, its method's as "ffn", and whether its group is the "best".

    Vega looks them up while drawing: repeated in every row, they would make up most of the page.
    """
    names = [
        {"run": run.index, "label": run.label, "ffn": method.label, "best": not method.is_tuned or group is method.best}
        for method in comparison.methods
        for group in method.groups
        for run in group.runs
    ]
    source = alt.LookupData(data=alt.InlineData(values=names), key="run", fields=["label", "ffn", "best"])
    return alt.Chart(alt.InlineData(values=rows)).transform_lookup(lookup="run", from_=source)


def _points(lines: Sequence[Line]) -> Rows:
    """Return rows with run, x, y, "early" where the y axis ignores them, and the number of gaps before as "part"."""
    start = _WARM_UP * max(float(line.x[np.isfinite(line.x)][-1]) for line in lines)
    late = {line: line.y[(line.x >= start) & np.isfinite(line.y)] for line in lines}
    if not any(map(len, late.values())):
        start = 0.0
    steady = [y.max() for line, y in late.items() if line.run.diverged_at is None and len(y)]
    top = max(steady, default=np.inf)
    rows = [row for line in lines for row in _rows(line, line.y, _limit(lines))]
    return [row | ({"early": 1} if row["x"] < start or row["y"] > top else {}) for row in rows]


def _raw_points(lines: Sequence[Line]) -> Rows:
    long = [(line, line.raw) for line in lines if line.raw is not None and len(line.raw) >= 50]
    return [row for line, raw in long for row in _rows(line, raw, 2 * _limit(lines))]


def _limit(lines: Sequence[Line]) -> int:
    return int(np.clip(_POINTS // len(lines), _FEWEST_POINTS, _MOST_POINTS))


def _rows(line: Line, y: Values, limit: int) -> Rows:
    """Return at most `limit` finite points, spread evenly, including the first and the last."""
    finite = np.isfinite(line.x) & np.isfinite(y)
    part, at = np.cumsum(~finite), np.flatnonzero(finite)
    if len(at) > limit:
        at = at[np.unique(np.linspace(0, len(at) - 1, limit).round().astype(int))]
    return [
        {"run": line.run.index, "x": short(line.x[i]), "y": short(y[i])} | ({"part": int(part[i])} if part[i] else {})
        for i in at
    ]


def _diverged_ends(lines: Sequence[Line]) -> Rows:
    """Return the last finite point of every diverged run."""
    return [
        _rows(line, line.y, len(line.x))[-1] | {"diverged": formatting.grouped(line.run.diverged_at)}
        for line in lines
        if line.run.diverged_at is not None
    ]
