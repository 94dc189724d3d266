"""Losses of training runs against what they have seen, spent and waited for: one line a run, on axes that fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from moa_eval.page import formatting
from moa_eval.page.charts import INK, MUTED, POINTER, Chart, colours, draw, shapes
from moa_eval.training.comparison import Comparison
from moa_eval.training.runs import Columns, Run

CROSS = "M-1,-1L1,1M-1,1L1,-1"  # where a run diverged
_WARM_UP = 0.1  # the part of the x axis whose losses do not set the y axis: there every loss falls steeply
_POINTS = 4000  # on one figure's lines, so that a page of many long runs stays light; tables/ has every row
_FEWEST_POINTS, _MOST_POINTS = 60, 250  # on one run's line
_MARKED_POINTS = 25  # a line of no more points shows them
_AT = "scale('y', datum.y)"  # pixels from the upper edge
_HELD = f"clamp({_AT}, 0, height)"  # a mark outside the frame would stretch the figure, even if nobody sees it
_VISIBLE = f"inrange({_AT}, [0, height])"
_PLAIN_ZERO = "datum.value === 0 ? '0' : datum.label"  # not "0k"
_DIGITS = 6  # significant ones of a value in a figure

Values = NDArray[np.float64]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Axis:
    """What lies on the x axis: its label, how a run's rows give it, and the format of its numbers."""

    label: str
    values: Callable[[Run, Columns], Values]
    format: str = "~s"


@dataclass(frozen=True)
class Line:
    """A run's position, its x and y (N values each), and the y as recorded where y is a mean over neighbours."""

    run: int
    x: Values
    y: Values
    raw: Values | None = None


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


def draw_curves(
    comparison: Comparison, name: str, title: str, lines: Sequence[Line], axis: Axis, *, zero: bool = False
) -> Chart | None:
    """Draw losses against one axis; None if no value is finite.

    The y axis is fitted to what is of interest: neither the first steep fall nor the peak of a run that diverges. A
    cross at the last finite value marks a run that diverges, at the frame where that value lies outside.

    Args:
        comparison: The runs.
        name, title: As `Chart` has them.
        lines: What to draw.
        axis: What x means.
        zero: Whether y is a difference: zero gets a line, and the axis holds it.
    """
    lines = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not lines:
        return None
    points = _points(comparison, lines)
    x = alt.X("x:Q").title(axis.label).axis(format=axis.format, labelExpr=_PLAIN_ZERO, tickCount=6).scale(nice=False)
    what = "difference" if zero else "loss"
    labels = [contender.label for contender in comparison.contenders]
    place = {"x": x, "color": alt.Color("ffn:N").scale(colours(labels))}
    layers = [_frame(points, what), *([_zero()] if zero else [])]
    if raw := _raw(lines):
        pale = _named(comparison, raw).mark_line(clip=True, strokeWidth=0.8, opacity=0.25)
        layers.append(pale.encode(**place, y=_inside(_AT), detail=["run:N", "part:N"]))
    layers.append(_strong(comparison, points, place))
    tooltip = [
        alt.Tooltip("label:N").title("run"),
        alt.Tooltip("x:Q").title(axis.label).format(".4~s" if axis.format == "~s" else ".4~g"),
        alt.Tooltip("y:Q").title(what).format(".5~g"),
    ]
    runs = [row["run"] for row in points]
    if max(map(runs.count, set(runs))) <= _MARKED_POINTS:
        layers.append(_marked(comparison, points, place))
    layers += _pointer(comparison, points, place, tooltip)
    if ends := _ends(comparison, lines):
        layers.append(_crosses(comparison, ends, place))
    hidden = [run for run in range(len(comparison.runs)) if run not in comparison.shown]
    return draw(name, title, alt.layer(*layers), hidden=hidden)


def short(value: float) -> float:
    """A value with as many digits as a figure can show."""
    return float(f"{value:.{_DIGITS}g}")


def _frame(points: Rows, title: str) -> alt.Chart:
    """The only layer with a y axis. The others follow its scale, and what lies outside is cut off."""
    fitted = alt.Chart(alt.InlineData(values=points)).transform_filter("!datum.early")
    y = alt.Y("low:Q").title(title).scale(zero=False)
    return fitted.transform_aggregate(low="min(y)", high="max(y)").mark_rule(opacity=0).encode(y=y, y2=alt.Y2("high:Q"))


def _zero() -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q")


def _inside(expression: str) -> Any:
    """A value that follows the y scale without extending it."""
    return alt.value(alt.ExprRef(expression))


def _strong(comparison: Comparison, points: Rows, place: dict[str, Any]) -> alt.Chart:
    """The lines: solid for a contender's best rate, dashed for its others."""
    width = 1.4 if any(len(arm.runs) > 1 for arm in comparison.arms) else 1.8
    dash = alt.when("datum.best").then(alt.value([1, 0])).otherwise(alt.value([4, 3]))
    lines = _named(comparison, points).mark_line(clip=True, strokeWidth=width, strokeCap="round")
    return lines.encode(**place, y=_inside(_AT), strokeDash=dash, detail=["run:N", "part:N"])


def _marked(comparison: Comparison, points: Rows, place: dict[str, Any]) -> alt.Chart:
    labels = [contender.label for contender in comparison.contenders]
    marks = _named(comparison, points).mark_point(filled=True, size=32)
    shape = alt.Shape("ffn:N").scale(shapes(labels))
    return marks.encode(**place, y=_inside(_HELD), shape=shape, opacity=_inside(f"{_VISIBLE} ? 0.9 : 0"))


def _pointer(
    comparison: Comparison, points: Rows, place: dict[str, Any], tooltip: Sequence[alt.Tooltip]
) -> list[alt.Chart]:
    """A rule and a mark at the point nearest to the pointer, with its values."""
    hover = alt.selection_point(name="hover", on="pointerover", clear="pointerout", nearest=True, empty=False)
    opacity = alt.when(hover).then(_inside(f"{_VISIBLE} ? 1 : 0")).otherwise(alt.value(0))
    rule = _named(comparison, points).transform_filter(hover).mark_rule(color=MUTED, strokeWidth=0.8)
    marks = _named(comparison, points).mark_point(filled=True, size=60)
    nearest = marks.encode(**place, y=_inside(_HELD), opacity=opacity, tooltip=list(tooltip))
    return [
        rule.encode(x=place["x"]).properties(name=f"{POINTER}_rule"),
        nearest.add_params(hover).properties(name=POINTER),
    ]


def _crosses(comparison: Comparison, ends: Rows, place: dict[str, Any]) -> alt.Chart:
    marks = _named(comparison, ends).mark_point(shape=CROSS, size=60, strokeWidth=2)
    tooltip = [alt.Tooltip("label:N").title("run"), alt.Tooltip("diverged:N").title("diverged at step")]
    return marks.encode(**place, y=_inside(_HELD), tooltip=tooltip)


def _named(comparison: Comparison, rows: Rows) -> alt.Chart:
    """Rows with a "run" get its label, its contender's label as "ffn", and whether its rate is the "best" one.

    Vega looks the names up while it draws: written into every row, they would be most of the page.
    """
    best = {contender.best for contender in comparison.contenders}
    names = []
    for run, label in enumerate(comparison.labels):
        contender = comparison.contenders[comparison.contender_of(run)]
        is_best = not contender.chosen or comparison.arm_of(run) in best
        names.append({"run": run, "label": label, "ffn": contender.label, "best": is_best})
    source = alt.LookupData(data=alt.InlineData(values=names), key="run", fields=["label", "ffn", "best"])
    return alt.Chart(alt.InlineData(values=rows)).transform_lookup(lookup="run", from_=source)


def _points(comparison: Comparison, lines: Sequence[Line]) -> Rows:
    """The lines' rows: run, x and y; "early" where the y axis ignores it, "part" counts the gaps before it."""
    start = _WARM_UP * max(float(line.x[np.isfinite(line.x)][-1]) for line in lines)
    late = {line.run: line.y[(line.x >= start) & np.isfinite(line.y)] for line in lines}
    if not any(map(len, late.values())):
        start = 0.0
    steady = [y for run, y in late.items() if comparison.runs[run].diverged_at is None and len(y)]
    top = max(map(np.max, steady)) if steady else np.inf
    rows = [row for line in lines for row in _rows(line.run, line.x, line.y, _limit(lines))]
    return [row | ({"early": 1} if row["x"] < start or row["y"] > top else {}) for row in rows]


def _raw(lines: Sequence[Line]) -> Rows:
    long = [(line, line.raw) for line in lines if line.raw is not None and len(line.raw) >= 50]
    return [row for line, raw in long for row in _rows(line.run, line.x, raw, 2 * _limit(lines))]


def _limit(lines: Sequence[Line]) -> int:
    return int(np.clip(_POINTS // len(lines), _FEWEST_POINTS, _MOST_POINTS))


def _rows(run: int, x: Values, y: Values, limit: int) -> Rows:
    """At most `limit` finite points of a line, evenly over its rows, the first and the last among them."""
    finite = np.isfinite(x) & np.isfinite(y)
    part, at = np.cumsum(~finite), np.flatnonzero(finite)
    if len(at) > limit:
        at = at[np.unique(np.linspace(0, len(at) - 1, limit).round().astype(int))]
    return [{"run": run, "x": short(x[i]), "y": short(y[i])} | ({"part": int(part[i])} if part[i] else {}) for i in at]


def _ends(comparison: Comparison, lines: Sequence[Line]) -> Rows:
    """The last finite point of every run that diverged."""
    ends = []
    for line in lines:
        step = comparison.runs[line.run].diverged_at
        if step is not None:
            ends.append(_rows(line.run, line.x, line.y, len(line.x))[-1] | {"diverged": formatting.grouped(step)})
    return ends
