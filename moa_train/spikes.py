"""Which losses stand out above those just before them."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 50
"""Steps over which recent losses are averaged, with exponential weights; the first so many are never spikes."""

DEVIATIONS = 5.0
"""Standard deviations above the recent mean from which on a loss is a spike."""

FLOOR = 1e-3
"""Smallest standard deviation that counts, relative to the mean: a loss that hardly moves has no spikes."""

TINY = 1e-12
"""Smallest standard deviation that counts at all."""


@dataclass
class RecentLoss:
    """Mean and variance of the losses of recent steps; part of what a checkpoint keeps, so that a resumed run finds
    the same spikes.

    Attributes:
        count: Losses taken.
        mean, variance: Exponentially weighted, the latter of the deviations from the mean of their time.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def take(self, loss: float) -> float | None:
        """Take the next (finite) loss in; return how many standard deviations it stands above the recent mean if it
        is a spike, else None.

        A spike counts in the mean and variance as the largest loss that is none, so that it does not hide the next.
        """
        deviation = max(math.sqrt(self.variance), FLOOR * abs(self.mean), TINY)
        spike = self.count >= MEMORY and loss > self.mean + DEVIATIONS * deviation
        above = (loss - self.mean) / deviation if spike else None
        self._add(self.mean + DEVIATIONS * deviation if spike else loss)
        return above

    def _add(self, loss: float) -> None:
        self.count += 1
        weight = 1 / min(self.count, MEMORY)
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change * change)
