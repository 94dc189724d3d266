"""Loss curves: one line per run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moa_eval.page.charts import INK, Chart, colours, draw, shapes
from moa_eval.training.comparison import Comparison
from moa_eval.training.runs import Columns, Run

CROSS = "M-1,-1L1,1M-1,1L1,-1"
"""Marker of a diverged run."""

_WARM_UP = 0.1  # fraction of the x axis that is left out, since every loss falls steeply there
_POINTS = 4000  # of all lines of a figure, so that a page of many long runs stays small
_FEWEST_POINTS, _MOST_POINTS = 60, 250  # of one line
_MARKED_POINTS = 25  # a line of at most that many points has markers
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
    """A run's line: x and y, N values each."""

    run: Run
    x: Values
    y: Values

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Whether each point is finite."""
        return np.isfinite(self.x) & np.isfinite(self.y)


def smooth(values: Values) -> Values:
    """Return a centred moving average over about a twenty-fifth of the values; NaN stays and affects no neighbour.

    The window is cut off at the ends. Fewer than 50 values are returned unchanged.
    """
    finite = np.isfinite(values)
    series = pd.Series(np.where(finite, values, np.nan))
    averaged = series.rolling(2 * (len(values) // 50) + 1, center=True, min_periods=1).mean()
    return np.where(finite, averaged, np.nan)


def draw_curves(
    comparison: Comparison,
    name: str,
    title: str,
    lines: Sequence[Line],
    axis: Axis,
    *,
    is_difference: bool = False,
    y_title: str = "loss",
) -> Chart | None:
    """Draw losses against an axis, differences with a line at zero; return None if no value is finite.

    Lines are solid at a method's best learning rate and dashed at others. A cross marks the last finite value of a
    diverged run. The steep beginning and the peak of a diverging run are left out.
    """
    lines = [line for line in lines if line.finite.any()]
    if not lines:
        return None
    start, top = _limits(lines)
    count = int(np.clip(_POINTS // len(lines), _FEWEST_POINTS, _MOST_POINTS))
    points = [row for line in lines for row in _points(line, start, top, count)]
    labels = [method.label for method in comparison.methods]
    y_title = "difference" if is_difference else y_title
    x = alt.X("x:Q").title(axis.label).axis(format=axis.format, labelExpr=_PLAIN_ZERO, tickCount=6).scale(nice=False)
    y = alt.Y("y:Q").title(y_title).scale(zero=False)
    place = {"x": x, "y": y, "color": alt.Color("ffn:N").scale(colours(labels))}
    tooltip = [
        alt.Tooltip("label:N").title("run"),
        alt.Tooltip("x:Q").title(axis.label).format(".4~s" if axis.format == "~s" else ".4~g"),
        alt.Tooltip("y:Q").title(y_title).format(".5~g"),
    ]
    width = 1.4 if any(len(group.runs) > 1 for group in comparison.groups) else 1.8
    dash = alt.when("datum.best").then(alt.value([1, 0])).otherwise(alt.value([4, 3]))
    base = _named(comparison, points)
    layers = []
    if is_difference:
        zero = alt.Chart(alt.InlineData(values=[{"zero": 0}]))
        layers.append(zero.mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q"))
    line = base.mark_line(strokeWidth=width, strokeCap="round")
    layers.append(line.encode(**place, strokeDash=dash, detail=["run:N", "part:N"]))
    if max(Counter(row["run"] for row in points).values()) <= _MARKED_POINTS:
        shape = alt.Shape("ffn:N").scale(shapes(labels))
        layers.append(base.mark_point(filled=True, size=32, opacity=0.9).encode(**place, shape=shape))
    layers.append(base.mark_point(filled=True, size=60, opacity=0).encode(**place, tooltip=tooltip))  # for the pointer
    if ends := [_end(line, top) for line in lines if line.run.diverged_at is not None]:
        marks = _named(comparison, ends).mark_point(shape=CROSS, size=60, strokeWidth=2)
        diverged = [tooltip[0], alt.Tooltip("diverged:N").title("diverged at step")]
        layers.append(marks.encode(**place, tooltip=diverged))
    return draw(name, title, alt.layer(*layers), hidden=comparison.hidden)


def short(value: float) -> float:
    """Round a value to the digits that a figure can show."""
    return float(f"{value:.6g}")


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


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the first x and the highest y that are drawn."""
    start = _WARM_UP * max(float(line.x[np.isfinite(line.x)][-1]) for line in lines)
    late = {line: line.y[line.finite & (line.x >= start)] for line in lines}
    steady = [y.max() for line, y in late.items() if line.run.diverged_at is None and len(y)]
    return (start if any(map(len, late.values())) else 0.0), max(steady, default=np.inf)


def _points(line: Line, start: float, top: float, count: int) -> Rows:
    """Return at most `count` points, spread evenly, with the number of gaps before each as "part"."""
    part = np.cumsum(~line.finite)
    at = np.flatnonzero(line.finite & (line.x >= start) & (line.y <= top))
    if len(at) > count:
        at = at[np.unique(np.linspace(0, len(at) - 1, count).round().astype(int))]
    return [_point(line, i) | ({"part": int(part[i])} if part[i] else {}) for i in at.tolist()]


def _end(line: Line, top: float) -> dict[str, Any]:
    """Return the last finite point of a diverged run, at the upper edge if it lies beyond."""
    point = _point(line, int(np.flatnonzero(line.finite)[-1]))
    return point | {"y": min(point["y"], top), "diverged": f"{line.run.diverged_at}"}


def _point(line: Line, at: int) -> dict[str, Any]:
    return {"run": line.run.index, "x": short(line.x[at]), "y": short(line.y[at])}
