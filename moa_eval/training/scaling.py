"""Loss against model size: fitted lines, a test of parallel slopes, and the equivalent size of the baseline.

A line is log L = a + b log N by ordinary least squares with natural logarithms. L is the final validation loss at the
best learning rate (mean over seeds), N the number of active parameters without embeddings. There is no irreducible
loss: over a few sizes, a power law with an offset fits equally well, and the slopes depend on the offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from moa_eval.page import formatting
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Method
from moa_eval.training.intervals import UNKNOWN, Interval, by_seed, deviation, mean, student

FEWEST_SIZES = 3
"""Two points are always on a line."""


@dataclass(frozen=True, eq=False)
class Point:
    """One method on a line.

    Attributes:
        method: The method.
        parameters: Active parameters without embeddings.
        losses: Final validation loss by seed, at the best learning rate.
        flops: Training FLOPs of one run.
    """

    method: Method
    parameters: float
    losses: dict[int, float]
    flops: float

    @property
    def loss(self) -> float:
        """The mean loss over seeds."""
        return mean(self.losses.values())


@dataclass(frozen=True, eq=False)
class Line:
    """One FFN at three or more sizes, and log L = intercept + slope log N through its points.

    Attributes:
        label: Name of the FFN, such as "qd-MoA".
        points: Points by rising size.
        slope, intercept: Coefficients of the fit.
        is_baseline: Whether it is the baseline's line.
        baseline: The baseline's line; None for the baseline itself, or if the baseline has no line.
        slope_difference: Slope minus the baseline's slope, with its interval.
    """

    label: str
    points: tuple[Point, ...]
    slope: float
    intercept: float
    is_baseline: bool
    baseline: Line | None
    slope_difference: Interval = UNKNOWN

    def loss_at(self, parameters: float) -> float:
        """Return the loss on the line."""
        return math.exp(self.intercept + self.slope * math.log(parameters))

    def size_at(self, loss: float) -> float:
        """Return the parameters at which the line reaches a loss; NaN for a line that does not fall."""
        return math.exp((math.log(loss) - self.intercept) / self.slope) if self.slope < 0 else math.nan

    @property
    def middle(self) -> float:
        """The geometric mean of the sizes."""
        return math.exp(mean(math.log(point.parameters) for point in self.points))

    def equivalent_ratio(self, parameters: float) -> float:
        """Return the size at which the baseline's line has the loss of this line, as a multiple of `parameters`."""
        if self.is_baseline or self.baseline is None:
            return 1.0 if self.is_baseline else math.nan
        return self.baseline.size_at(self.loss_at(parameters)) / parameters


def fit_lines(comparison: Comparison) -> list[Line]:
    """Return a line per FFN that was trained at three or more sizes, the baseline's first."""
    families: dict[str, list[Method]] = {}
    for method in comparison.methods:
        families.setdefault(method.family, []).append(method)
    lines: list[Line] = []
    baseline: Line | None = None
    for methods in families.values():
        points = _points(methods, comparison.metric)
        if len({point.parameters for point in points}) >= FEWEST_SIZES:
            lines.append(_line(methods, points, baseline))
            baseline = lines[0] if lines[0].is_baseline else None
    return lines


def scaling_rows(lines: Sequence[Line]) -> list[Row]:
    """Return a row per point of every line."""
    return [
        {
            "ffn": line.label,
            "size": point.method.size,
            "method": point.method.label,
            "rate": point.method.best.learning_rate if point.method.best else math.nan,
            "seeds": len(point.losses),
            "parameters": point.parameters,
            "flops": point.flops,
            "loss": point.loss,
            "loss_sd": deviation(point.losses.values()),
            "fitted": line.loss_at(point.parameters),
            "equivalent_ratio": line.equivalent_ratio(point.parameters),
        }
        for line in lines
        for point in line.points
    ]


def line_rows(lines: Sequence[Line]) -> list[Row]:
    """Return a row per line: its fit, and its comparison with the baseline's line."""
    return [
        {
            "ffn": line.label,
            "sizes": len(line.points),
            "slope": line.slope,
            "intercept": line.intercept,
            "slope_difference": line.slope_difference.mean,
            "low_95": line.slope_difference.low,
            "high_95": line.slope_difference.high,
            "at_parameters": line.middle,
            "equivalent_ratio": line.equivalent_ratio(line.middle),
        }
        for line in lines
    ]


def sentences(lines: Sequence[Line]) -> list[str]:
    """Return sentences about the slopes, whether lines are parallel, and equivalent sizes."""
    slopes = ", ".join(f"{formatting.signed(line.slope)} ({line.label})" for line in lines)
    found = [f"Slope of log loss over log parameters: {slopes}."] if lines else []
    for line in lines:
        if line.baseline:
            found.append(f"{_slope_sentence(line, line.baseline)} {_equivalent_sentence(line, line.baseline)}".strip())
    return found


def _slope_sentence(line: Line, baseline: Line) -> str:
    gap = line.slope_difference
    words = f"Slope of {line.label} minus slope of {baseline.label}: {formatting.signed(gap.mean)}"
    if math.isnan(gap.low):
        return f"{words} (too few sizes and seeds for an interval)."
    limits = f"95 % interval {formatting.signed(gap.low)} to {formatting.signed(gap.high)}"
    reading = "the lines are not parallel" if gap.excludes_zero else "the lines may be parallel"
    return f"{words} ({limits}): {reading}."


def _equivalent_sentence(line: Line, baseline: Line) -> str:
    ratio = line.equivalent_ratio(line.middle)
    if math.isnan(ratio):
        return ""
    at = formatting.count(line.middle)
    return f"At {at} parameters it reaches the loss of {baseline.label} with {formatting.ratio(ratio)} the parameters."


def _line(methods: Sequence[Method], points: Sequence[Point], baseline: Line | None) -> Line:
    sizes, losses = [point.parameters for point in points], [point.loss for point in points]
    fit: Any = stats.linregress(np.log(sizes), np.log(losses))
    return Line(
        label=min((method.name for method in methods), key=len),
        points=tuple(points),
        slope=float(fit.slope),
        intercept=float(fit.intercept),
        is_baseline=methods[0].index == 0,
        baseline=baseline,
        slope_difference=_slope_difference(points, baseline.points) if baseline else UNKNOWN,
    )


def _points(methods: Sequence[Method], metric: str) -> list[Point]:
    points = []
    for method in methods:
        runs = [run for run in method.complete if run.active_parameters > 0]
        if runs:
            losses = by_seed(runs, [run.final(metric) for run in runs])
            points.append(Point(method, runs[0].active_parameters, losses, runs[0].seen * runs[0].flops_per_unit))
    return sorted(points, key=lambda point: point.parameters)


def _slope_difference(points: Sequence[Point], baseline: Sequence[Point]) -> Interval:
    """Return the slope of the difference in log loss over the baseline's log N, with Student's t interval.

    The difference at equal sizes removes what both curves share, curvature included. Each common seed of a size is a
    point, so that the scatter holds the seed noise; without common seeds, the means are one point.
    """
    x, y = [], []
    at_size = {point.method.size: point for point in baseline}
    for own in points:
        if other := at_size.get(own.method.size):
            seeds = [seed for seed in own.losses if seed in other.losses]
            pairs = [(own.losses[seed], other.losses[seed]) for seed in seeds] or [(own.loss, other.loss)]
            x += [math.log(other.parameters)] * len(pairs)
            y += [math.log(a) - math.log(b) for a, b in pairs]
    if len(set(x)) < 2:
        return UNKNOWN
    fit: Any = stats.linregress(x, y)
    half = float(fit.stderr) * student(len(x) - 2) if len(x) > 2 else math.nan
    return Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half, True)
