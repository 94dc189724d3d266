"""Tolerance of a method to its peak learning rate: the span of rates around the best one that are equally good."""

from __future__ import annotations

import math
from collections.abc import Iterable

from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Method, RunGroup
from moa_eval.training.intervals import quotient

TOLERANCE = 0.01
"""Excess over the best mean loss up to which a learning rate is good."""


def tolerance_rows(comparison: Comparison) -> list[Row]:
    """Return a row per method about the learning rates that were tried and the good ones.

    "edge" says whether the best rate is the "lowest" or "highest" tried. "span" is the ratio of the highest to the
    lowest good rate, without a worse, diverged or unfinished rate in between; NaN without a best rate.
    """
    rows = []
    for method in comparison.methods:
        low, high = _good_rates(method, comparison.metric)
        rows.append(
            {
                "method": method.label,
                "rates_tried": len(method.groups),
                "lowest_rate": method.groups[0].learning_rate,
                "highest_rate": method.groups[-1].learning_rate,
                "best_rate": method.best_rate,
                "edge": method.edge,
                "low_good_rate": low,
                "high_good_rate": high,
                "span": quotient(high, low),
                "diverged_rates": sum(bool(group.diverged) for group in method.groups),
            }
        )
    return rows


def _good_rates(method: Method, loss: str) -> tuple[float, float]:
    """Return the lowest and highest good rate around the best one."""
    if method.best is None:
        return math.nan, math.nan
    limit = method.best.mean_loss(loss) * (1 + TOLERANCE)
    at = method.groups.index(method.best)

    def last_good(groups: Iterable[RunGroup]) -> float:
        rate = method.best_rate
        for group in groups:
            if len(group.complete) < len(group.runs) or group.mean_loss(loss) > limit:
                break
            rate = group.learning_rate
        return rate

    return last_good(reversed(method.groups[:at])), last_good(method.groups[at + 1 :])
