"""Paired statistics of two models on the same items: exact test, bootstrap interval, standard error, power.

All functions take one stratum per task. The statistic is the mean over strata of each stratum's mean difference, which
for the zero-shot tasks is the difference of the two averages. Results have the unit of the scores: fractions for
accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
SEED = 0
_BLOCK = 100
"""Resamples drawn at once, which bounds memory where all scores differ."""


class Table(NamedTuple):
    """2 x 2 table of two models' right and wrong answers to the same items.

    Attributes:
        both, first, second, neither: Number of items that both models, only the first, only the second, or neither
            answered correctly.
    """

    both: int
    first: int
    second: int
    neither: int


class Interval(NamedTuple):
    """Two-sided interval at `CONFIDENCE`."""

    low: float
    high: float


def table(first: ArrayLike, second: ArrayLike) -> Table | None:
    """Return the 2 x 2 table of two models' scores (N,); None if there are scores other than 0 and 1."""
    a, b = np.asarray(first), np.asarray(second)
    if not np.isin([a, b], (0, 1)).all():
        return None
    return Table(*(int(np.sum((a == x) & (b == y))) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))))


def stratified_mcnemar(tables: Sequence[Table]) -> float:
    """Return the two-sided p-value of the exact McNemar test, stratified; 1 if all answers agree.

    Under the null hypothesis each discordant item falls to either model with probability 1/2, so the mean over strata
    of (first - second) / size is a sum of independent centred binomials with weights 1 / size. Its tail is summed over
    all outcomes, in integer multiples of 1 / lcm(sizes), so that ties with the observed outcome are exact. For one
    stratum this is the exact test of McNemar (1947), "Note on the sampling error of the difference between correlated
    proportions or percentages"; for several it is the permutation test that swaps the models item by item (Fisher
    1935, "The Design of Experiments").
    """
    unit = math.lcm(*(sum(t) for t in tables))
    observed = abs(sum((t.first - t.second) * (unit // sum(t)) for t in tables))
    if observed == 0:
        return 1.0
    # Four binomials have too many joint outcomes to list; two halves of two binomials do not.
    halves = [(np.zeros(1, np.int64), np.ones(1)) for _ in range(2)]
    for t in sorted(tables, key=lambda t: t.first + t.second, reverse=True):
        smaller = min((0, 1), key=lambda half: len(halves[half][0]))
        halves[smaller] = _add_binomial(*halves[smaller], t.first + t.second, unit // sum(t))
    (left, left_mass), (right, right_mass) = halves
    tail = np.concatenate([[0.0], np.cumsum(right_mass)])
    at_most = tail[np.searchsorted(right, -observed - left, side="right")]
    return min(1.0, 2.0 * float(left_mass @ at_most))  # the null distribution is symmetric


def bootstrap(differences: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Return the percentile bootstrap interval of the mean over strata of each stratum's mean difference.

    Items are drawn with replacement within each stratum. Drawing N items is the same as drawing how often each distinct
    difference occurs (a multinomial), at a cost independent of N for right-or-wrong scores. Source: Efron and
    Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13.

    Args:
        differences: Differences of scores (N,) per stratum, one model minus the other, paired by item.
        resamples: Number of resamples.
        seed: Seed of the generator.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for stratum in differences:
        values, counts = np.unique(stratum, return_counts=True)
        size = counts.sum()
        for start in range(0, resamples, _BLOCK):
            block = means[start : start + _BLOCK]
            drawn = generator.multinomial(size, counts / size, size=len(block))
            block += drawn @ values / (size * len(differences))
    return Interval(*map(float, np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])))


def mean_difference(differences: Sequence[ArrayLike]) -> float:
    """Return the mean over strata of each stratum's mean difference."""
    return float(np.mean([np.asarray(stratum).mean() for stratum in differences]))


def standard_error(differences: Sequence[ArrayLike]) -> float:
    """Return the standard error of `mean_difference`; NaN if a stratum has a single item.

    sqrt(sum over strata of s^2 / N) / strata. Source: Miller (2024), "Adding Error Bars to Evals", arXiv:2411.00640,
    section on paired differences.
    """
    if min(np.size(stratum) for stratum in differences) < 2:
        return math.nan
    return float(np.linalg.norm([stats.sem(stratum) for stratum in differences])) / len(differences)


def detectable(stderr: float) -> float:
    """Return the smallest true difference that is significant in `POWER` of such evaluations.

    Normal approximation (z_{1 - alpha / 2} + z_power) * stderr with the standard error of the paired difference, so
    it assumes the same rate of disagreement. Source: as `standard_error`.
    """
    return float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) * stderr


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values adjusted for multiple tests, in the order given.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return adjusted


def _add_binomial(
    values: NDArray[np.int64], masses: NDArray[np.float64], number: int, weight: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the distribution of a sum plus weight * (2 B - number), B ~ Binomial(number, 1/2), sorted by value."""
    counts = np.arange(number + 1)
    values = np.add.outer(values, weight * (2 * counts - number)).ravel()
    binomial = [math.comb(number, count) / 2**number for count in range(number + 1)]  # exact, unlike scipy's
    masses = np.multiply.outer(masses, binomial).ravel()
    order = np.argsort(values, kind="stable")
    return values[order], masses[order]
