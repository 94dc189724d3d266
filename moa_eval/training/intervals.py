"""Losses by seed: means, standard deviations, and differences with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from moa_eval.training.runs import Run

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean difference over seeds and its two-sided confidence interval (NaN limits for fewer than two seeds)."""

    mean: float
    low: float
    high: float
    paired: bool

    @property
    def excludes_zero(self) -> bool:
        """Whether both limits have the same sign."""
        return self.low > 0 or self.high < 0


UNKNOWN = Interval(math.nan, math.nan, math.nan, False)


def mean(values: Iterable[float]) -> float:
    """Return the mean, NaN for no values."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Iterable[float]) -> float:
    """Return the sample standard deviation (n - 1), NaN for fewer than two values."""
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def quotient(value: float, baseline: float) -> float:
    """Return value / baseline, NaN for a baseline of zero."""
    return value / baseline if baseline else math.nan


def by_seed(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    """Return one value per seed from one value per run; runs of one seed are averaged into one observation."""
    found: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(run.seed, []).append(value)
    return {seed: mean(found[seed]) for seed in sorted(found)}


def difference(values: Mapping[int, float], baseline: Mapping[int, float], comparisons: int = 1) -> Interval:
    """Return the mean difference of losses by seed with a Student's t interval at `CONFIDENCE`.

    Equal sets of seeds are paired, since they share data order, crops and masks: the t interval of the differences.
    Other sets get Welch's t interval (Welch 1947, "The generalization of Student's problem").

    Args:
        values: Loss by seed.
        baseline: The baseline's loss by seed.
        comparisons: Number of intervals that hold together at `CONFIDENCE` (Dunn 1961, "Multiple comparisons among
            means").
    """
    a, b = np.array([*values.values()]), np.array([*baseline.values()])
    paired = values.keys() == baseline.keys()
    centre = mean(a) - mean(b)
    if min(len(a), len(b)) < 2:
        return Interval(centre, math.nan, math.nan, paired)
    if paired:
        variance = float(np.var([values[seed] - baseline[seed] for seed in values], ddof=1)) / len(a)
        freedom = len(a) - 1.0
    else:
        own, other = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
        variance = own + other
        spread = own**2 / (len(a) - 1) + other**2 / (len(b) - 1)
        freedom = variance**2 / spread if spread > 0 else len(a) + len(b) - 2.0
    half = student(freedom, comparisons) * math.sqrt(variance)
    return Interval(centre, centre - half, centre + half, paired)


def student(freedom: float, comparisons: int = 1) -> float:
    """Return the two-sided quantile of Student's t distribution at `CONFIDENCE`, Bonferroni-corrected."""
    return float(stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), freedom))
