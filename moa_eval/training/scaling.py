"""Loss against size: a fitted line a family, whether two lines are parallel, and what a better FFN is worth in size.

A line is log L = a + b log N by ordinary least squares, with natural logarithms, the final validation loss L at the
best rate (mean over seeds) and the parameters N that every token passes, embeddings left out. There is no
irreducible loss in it: over the sizes of one study a power law and one with an offset can hardly be told apart, and
with an offset the slopes depend on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from moa_eval.page import formatting
from moa_eval.page.formatting import enumerate_words
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison
from moa_eval.training.runs import Run
from moa_eval.training.seeds import CONFIDENCE, Interval, by_seed, deviation, mean

FEWEST_SIZES = 3  # two points are always on a line


@dataclass(frozen=True)
class Point:
    """One family at one size.

    Attributes:
        contender: Its position.
        size: What the page calls the size.
        parameters: Parameters that every token passes, embeddings left out.
        losses: Final validation loss by seed, at the best rate.
        compute: FLOPs of one run's training.
    """

    contender: int
    size: str
    parameters: float
    losses: dict[int, float]
    compute: float

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return mean(self.losses.values())


@dataclass(frozen=True)
class Line:
    """A family at three or more sizes, and log L = intercept + slope log N through its points.

    Attributes:
        label: The FFN, such as "qd-MoA".
        points: By rising size.
        slope, intercept: Of the fit.
        against: The slope minus that of the baseline's family, with its interval; None for that family itself.
    """

    label: str
    points: tuple[Point, ...]
    slope: float
    intercept: float
    against: Interval | None

    def loss_at(self, parameters: float) -> float:
        """The loss on the line."""
        return math.exp(self.intercept + self.slope * math.log(parameters))

    def size_at(self, loss: float) -> float:
        """The parameters at which the line has a loss; NaN where it does not fall."""
        return math.exp((math.log(loss) - self.intercept) / self.slope) if self.slope < 0 else math.nan

    @property
    def middle(self) -> float:
        """The geometric mean of the sizes: where the fit is surest."""
        return math.exp(mean(math.log(point.parameters) for point in self.points))


def fit_lines(comparison: Comparison) -> list[Line]:
    """A line for every family that was trained at three sizes or more, the baseline's first; empty without any."""
    points = [_points(comparison, family) for family in _families(comparison)]
    own = [(label, found) for label, found in zip(_labels(comparison), points, strict=True) if _enough(found)]
    baseline = points[0]
    return [
        _line(label, found, None if found is baseline else _slope_difference(found, baseline)) for label, found in own
    ]


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope and intercept by ordinary least squares, and the slope's standard error (NaN for two points)."""
    u, v = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred = u - u.mean()
    spread = float(centred @ centred)
    slope = float(centred @ v) / spread
    rest = v - v.mean() - slope * centred
    freedom = len(u) - 2
    error = math.sqrt(float(rest @ rest) / freedom / spread) if freedom > 0 else math.nan
    return slope, float(v.mean() - slope * u.mean()), error


def equivalent(line: Line, baseline: Line, parameters: float) -> float:
    """The baseline's size with the loss that a line has at a size, as a multiple of that; NaN if there is none."""
    return baseline.size_at(line.loss_at(parameters)) / parameters


def scaling_rows(comparison: Comparison, lines: Sequence[Line]) -> list[Row]:
    """A row a point of every line: its size, its loss, the loss on the line, and the baseline's equivalent size."""
    rows = []
    for line in lines:
        for point in line.points:
            contender = comparison.contenders[point.contender]
            row: Row = {"ffn": line.label, "size": point.size, "contender": contender.label}
            rate = math.nan if contender.best is None else comparison.arms[contender.best].rate
            row |= {"rate": rate, "seeds": len(point.losses), "parameters": point.parameters, "flops": point.compute}
            row |= {"loss": point.loss, "loss_sd": deviation(point.losses.values())}
            row |= {"fitted": line.loss_at(point.parameters)}
            rows.append(row | {"equivalent_ratio": _against(line, lines, point.parameters)})
    return rows


def line_rows(lines: Sequence[Line]) -> list[Row]:
    """A row a line: log loss = intercept + slope log parameters, and how it lies to the baseline's."""
    rows = []
    for line in lines:
        gap = line.against or Interval(math.nan, math.nan, math.nan, False)
        row: Row = {"ffn": line.label, "sizes": len(line.points), "slope": line.slope, "intercept": line.intercept}
        row |= {"slope_difference": gap.mean, "low_95": gap.low, "high_95": gap.high, "at_parameters": line.middle}
        rows.append(row | {"equivalent_ratio": _against(line, lines, line.middle)})
    return rows


def sentences(lines: Sequence[Line]) -> list[str]:
    """What the lines say: their slopes, whether they are parallel, and what each FFN is worth in size."""
    if not lines:
        return []
    slopes = [f"{formatting.signed(line.slope)} ({line.label})" for line in lines]
    verb = "the slope is" if len(lines) == 1 else "the slopes are"
    found = [f"Of log loss over log parameters {verb} {enumerate_words(slopes)}."]
    baseline = next((line for line in lines if line.against is None), None)
    for line in lines if baseline else ():
        if baseline is None or line.against is None:
            continue
        found.append(f"{_parallel(line, baseline, line.against)} {_worth(line, baseline)}".strip())
    return found


def _parallel(line: Line, baseline: Line, gap: Interval) -> str:
    words = f"The slope of {line.label} differs from that of {baseline.label} by {formatting.signed(gap.mean)}"
    if math.isnan(gap.low):
        return f"{words}; how sure that is, too few sizes and seeds say."
    limits = f"95 % interval {formatting.signed(gap.low)} to {formatting.signed(gap.high)}"
    if gap.low <= 0 <= gap.high:
        return f"{words} ({limits}): the lines may be parallel."
    return f"{words} ({limits}): the lines are not parallel, the difference in loss changes with size."


def _worth(line: Line, baseline: Line) -> str:
    multiple = equivalent(line, baseline, line.middle)
    if math.isnan(multiple):
        return ""
    at = formatting.count(line.middle)
    return f"On the lines its loss at {at} parameters is {baseline.label}'s at {formatting.ratio(multiple)} as many."


def _against(line: Line, lines: Sequence[Line], parameters: float) -> float:
    baseline = next((own for own in lines if own.against is None), None)
    return math.nan if baseline is None else equivalent(line, baseline, parameters)


def _line(label: str, points: Sequence[Point], against: Interval | None) -> Line:
    logs = [math.log(point.parameters) for point in points]
    slope, intercept, _ = fit(logs, [math.log(point.loss) for point in points])
    return Line(label, tuple(points), slope, intercept, against)


def _slope_difference(points: Sequence[Point], baseline: Sequence[Point]) -> Interval:
    """The slope of the difference in log loss over log N of the baseline, at the sizes that both have.

    Taking differences first leaves out what both curves share, bends included. Seeds that both have at a size are a
    point each, so that the scatter holds their noise; without common seeds the means are one. Student's interval.
    """
    x, y = [], []
    at_size = {point.size: point for point in baseline}
    for own, other in [(point, at_size[point.size]) for point in points if point.size in at_size]:
        seeds = [seed for seed in own.losses if seed in other.losses]
        sides = [(own.losses[seed], other.losses[seed]) for seed in seeds] or [(own.loss, other.loss)]
        x += [math.log(other.parameters)] * len(sides)
        y += [math.log(a) - math.log(b) for a, b in sides]
    if len(set(x)) < 2:
        return Interval(math.nan, math.nan, math.nan, True)
    slope, _, error = fit(x, y)
    half = error * float(stdtrit(max(len(x) - 2, 1), 0.5 + CONFIDENCE / 2))
    return Interval(slope, slope - half, slope + half, True)


def _enough(points: Sequence[Point]) -> bool:
    return len({point.parameters for point in points}) >= FEWEST_SIZES


def _families(comparison: Comparison) -> list[list[int]]:
    """The contenders of every family by position, the baseline's family first."""
    numbers = dict.fromkeys(contender.family for contender in comparison.contenders)
    return [
        [index for index, contender in enumerate(comparison.contenders) if contender.family == family]
        for family in numbers
    ]


def _points(comparison: Comparison, family: Sequence[int]) -> list[Point]:
    points = []
    for index in family:
        arm, size = comparison.contenders[index].best, comparison.contenders[index].size
        runs = [] if arm is None else comparison.complete(comparison.arms[arm].runs)
        known = [run for run in runs if run.parameters_at_work > 0]
        if known:
            losses = by_seed(known, [float(run.validation[comparison.metric][-1]) for run in known])
            points.append(Point(index, size, known[0].parameters_at_work, losses, _compute(known[0])))
    return sorted(points, key=lambda point: point.parameters)


def _compute(run: Run) -> float:
    return run.seen * run.flops_per_unit


def _labels(comparison: Comparison) -> list[str]:
    """What the page calls each family: the shortest of its contenders' labels, without the size."""
    return [min((comparison.contenders[index].ffn for index in family), key=len) for family in _families(comparison)]
