"""Tolerance of a method to its peak learning rate: the width of the range of rates around the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Method
from moa_eval.training.intervals import difference, mean

TOLERANCE = 0.01
"""Excess over the best loss up to which a learning rate is good, as a fraction."""


class GoodRange(NamedTuple):
    """The range of good learning rates.

    Attributes:
        low, high: Its ends.
        open_low, open_high: Whether the loss is still good at the lowest or highest rate tried, which is then the end.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool


def tolerance_rows(comparison: Comparison) -> list[Row]:
    """Return a row per method about the learning rates that were tried and the good ones.

    "edge" says whether the best rate is the "lowest" or "highest" tried. Each seed that was trained at all rates has a
    `good_range`; "span" is the ratio of its ends, as the geometric mean over seeds with Student's t interval of the
    logarithm. "open" names the ends ("low", "high", "low and high") that lie beyond the rates tried in any seed: the
    span is a lower bound and its upper limit NaN. NaN without such a seed, or with a single rate.
    """
    rows = []
    for method in comparison.methods:
        ranges = _ranges(method, comparison.metric)
        widths = {seed: math.log(found.high / found.low) for seed, found in ranges.items()}
        interval = difference(widths, dict.fromkeys(widths, 0.0))
        ends = {"low": [found.open_low for found in ranges.values()], "high": [r.open_high for r in ranges.values()]}
        open_ends = " and ".join(end for end, is_open in ends.items() if any(is_open))
        rows.append(
            {
                "method": method.label,
                "rates_tried": len(method.groups),
                "lowest_rate": method.groups[0].learning_rate,
                "highest_rate": method.groups[-1].learning_rate,
                "best_rate": method.best_rate,
                "edge": method.edge,
                "low_good_rate": _geometric_mean([found.low for found in ranges.values()]),
                "high_good_rate": _geometric_mean([found.high for found in ranges.values()]),
                "span": math.exp(interval.mean),
                "span_low_95": math.exp(interval.low),
                "span_high_95": math.nan if open_ends else math.exp(interval.high),
                "span_seeds": len(ranges),
                "open": open_ends,
                "diverged_rates": sum(bool(group.diverged) for group in method.groups),
            }
        )
    return rows


def good_range(rates: Sequence[float], losses: Sequence[float]) -> GoodRange:
    """Return the range of rates around the best one whose loss exceeds the lowest by at most `TOLERANCE`.

    Between rates the loss is interpolated linearly in the logarithm of the rate. Next to a diverged rate, whose loss
    is infinite, the range ends at the last rate that did not diverge.

    Args:
        rates: Rising rates.
        losses: Losses at these rates; at least one is finite.
    """
    points = [*zip(map(math.log, rates), losses, strict=True)]
    best = min(range(len(points)), key=lambda at: points[at][1])
    limit = losses[best] * (1 + TOLERANCE)

    def walk(points: Sequence[tuple[float, float]]) -> tuple[float, bool]:
        for (x, loss), (beyond, worse) in pairwise(points):
            if worse > limit:
                return math.exp(x + (beyond - x) * (limit - loss) / (worse - loss)), False
        return math.exp(points[-1][0]), True

    low, open_low = walk(points[best::-1])
    high, open_high = walk(points[best:])
    return GoodRange(low, high, open_low, open_high)


def _ranges(method: Method, loss: str) -> dict[int, GoodRange]:
    """Return the good range of every seed that was trained to the end, or diverged, at all rates with such runs."""
    groups = [group for group in method.groups if group.complete or group.diverged]
    by_rate = [{**group.final_losses(loss), **{run.seed: math.inf for run in group.diverged}} for group in groups]
    rates = [group.learning_rate for group in groups]
    seeds = [seed for seed in by_rate[0] if all(seed in losses for losses in by_rate)] if len(groups) > 1 else []
    curves = {seed: [losses[seed] for losses in by_rate] for seed in seeds}
    return {seed: good_range(rates, curve) for seed, curve in curves.items() if math.isfinite(min(curve))}


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(mean(map(math.log, values)))
