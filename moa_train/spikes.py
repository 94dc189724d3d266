"""Detection of loss spikes: losses far above their running mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 50
"""Steps of the exponential average of recent losses; the first steps of a run are never spikes."""

DEVIATIONS = 5.0
"""Standard deviations above the running mean from which a loss is a spike."""

FLOOR = 1e-3
"""Lower bound of the standard deviation, relative to the mean: a nearly constant loss has no spikes."""

TINY = 1e-12
"""Lower bound of the standard deviation of a loss around zero."""


@dataclass
class RecentLoss:
    """Exponentially weighted mean and variance of recent losses; stored in checkpoints.

    Attributes:
        count: Number of losses.
        mean: Mean.
        variance: Variance of the deviations from the mean at their time.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, loss: float) -> float | None:
        """Add the next finite loss; return its deviation in standard deviations if it is a spike, else None.

        A spike enters the mean and variance clipped to the threshold, so that it does not hide the next one.
        """
        deviation = max(math.sqrt(self.variance), FLOOR * abs(self.mean), TINY)
        threshold = self.mean + DEVIATIONS * deviation
        spike = self.count >= MEMORY and loss > threshold
        above = (loss - self.mean) / deviation if spike else None
        self._add(threshold if spike else loss)
        return above

    def _add(self, loss: float) -> None:
        self.count += 1
        weight = 1 / min(self.count, MEMORY)
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change * change)
