"""Paired statistics of two models on the same items: tests, bootstrap interval, standard error, power.

All functions take one stratum per task. The statistic is the mean over strata of each stratum's mean difference, which
for the zero-shot tasks is the difference of the two averages. Results have the unit of the scores: fractions for
accuracies. Related items form a cluster, the unit that is independent of all others; by default each item is one.
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


def stratified_mcnemar(differences: Sequence[ArrayLike], clusters: Sequence[ArrayLike] | None = None) -> float:
    """Return the two-sided p-value of the exact McNemar test, stratified; 1 if all answers agree.

    Under the null hypothesis the difference of each cluster has either sign with probability 1/2, so the statistic is a
    sum of independent centred binomials. Its tail is summed over all outcomes, in integer multiples of 1 / lcm(sizes),
    so that ties with the observed outcome are exact. For one stratum of single items this is the exact test of McNemar
    (1947), "Note on the sampling error of the difference between correlated proportions or percentages"; in general
    it is the permutation test that swaps the models cluster by cluster (Fisher 1935, "The Design of Experiments").

    Args:
        differences: Differences (N,) of right (1) and wrong (0) answers per stratum.
        clusters: Number (N,) of each item's cluster per stratum.
    """
    unit = math.lcm(*(np.size(stratum) for stratum in differences))
    binomials, observed = [], 0
    for stratum, cluster in zip(differences, _clusters(differences, clusters), strict=True):
        sums = np.bincount(cluster, np.asarray(stratum)).astype(np.int64)
        weight = unit // np.size(stratum)
        observed += int(sums.sum()) * weight
        sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
        binomials += [(int(n), int(size) * weight) for size, n in zip(sizes, counts, strict=True)]
    if observed == 0:
        return 1.0
    observed = abs(observed)
    # Four binomials have too many joint outcomes to list; two halves of two binomials do not.
    halves = [(np.zeros(1, np.int64), np.ones(1)) for _ in range(2)]
    for number, weight in sorted(binomials, reverse=True):
        smaller = min((0, 1), key=lambda half: len(halves[half][0]))
        halves[smaller] = _add_binomial(*halves[smaller], number, weight)
    (left, left_mass), (right, right_mass) = halves
    tail = np.concatenate([[0.0], np.cumsum(right_mass)])
    at_most = tail[np.searchsorted(right, -observed - left, side="right")]
    return min(1.0, 2.0 * float(left_mass @ at_most))  # the null distribution is symmetric


def t_test(differences: Sequence[ArrayLike], clusters: Sequence[ArrayLike] | None = None) -> float:
    """Return the two-sided p-value of the paired t-test of a mean of 0, by the standard error of `standard_error`.

    For one stratum of single items it is scipy's `ttest_rel`; for several strata the degrees of freedom are those of
    Welch and Satterthwaite.
    """
    variances, freedom = _variances(differences, clusters)
    total = variances.sum()
    mean = mean_difference(differences) * len(variances)
    if not total > 0:
        return math.nan if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(total), total**2 / (variances**2 / freedom).sum()))


def bootstrap(
    differences: Sequence[ArrayLike],
    clusters: Sequence[ArrayLike] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Return the percentile bootstrap interval of the mean over strata of each stratum's mean difference.

    Clusters are drawn with replacement within each stratum. Drawing them is the same as drawing how often each distinct
    pair of a cluster's sum and size occurs (a multinomial), at a cost independent of N for right-or-wrong scores.
    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13.

    Args:
        differences: Differences of scores (N,) per stratum, one model minus the other, paired by item.
        clusters: Number (N,) of each item's cluster per stratum.
        resamples: Number of resamples.
        seed: Seed of the generator.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for stratum, cluster in zip(differences, _clusters(differences, clusters), strict=True):
        pairs = np.stack([np.bincount(cluster, np.asarray(stratum)), np.bincount(cluster)], axis=1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        number = counts.sum()
        for start in range(0, resamples, _BLOCK):
            block = means[start : start + _BLOCK]
            if len(pairs) < number / 4:
                sums, sizes = (generator.multinomial(number, counts / number, size=len(block)) @ pairs).T
            else:  # continuous scores: indices are drawn faster than counts
                sums, sizes = pairs[generator.integers(0, len(pairs), (len(block), number))].sum(axis=1).T
            block += sums / sizes / len(differences)
    return Interval(*map(float, np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])))


def mean_difference(differences: Sequence[ArrayLike]) -> float:
    """Return the mean over strata of each stratum's mean difference."""
    return float(np.mean([np.asarray(stratum).mean() for stratum in differences]))


def standard_error(differences: Sequence[ArrayLike], clusters: Sequence[ArrayLike] | None = None) -> float:
    """Return the standard error of `mean_difference`; NaN if a stratum has a single cluster.

    Per stratum, the square is G / (G - 1) sum_c (sum over the items of cluster c of d - mean)^2 / N^2 for G clusters:
    s^2 / N for single items. Source: Miller (2024), "Adding Error Bars to Evals", arXiv:2411.00640, sections on
    paired differences and on clustered questions.
    """
    variances, _ = _variances(differences, clusters)
    return float(np.sqrt(variances.sum())) / len(variances)


def _variances(
    differences: Sequence[ArrayLike], clusters: Sequence[ArrayLike] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the squared standard error of each stratum's mean, and its degrees of freedom; NaN for one cluster."""
    variances, freedom = [], []
    for stratum, cluster in zip(differences, _clusters(differences, clusters), strict=True):
        values = np.asarray(stratum, dtype=float)
        sums = np.bincount(cluster, values - values.mean())
        groups = len(sums)
        factor = groups / (groups - 1) if groups > 1 else math.nan
        variances.append(factor * (sums**2).sum() / len(values) ** 2)
        freedom.append(groups - 1)
    return np.array(variances), np.array(freedom, dtype=float)


def _clusters(differences: Sequence[ArrayLike], clusters: Sequence[ArrayLike] | None) -> list[NDArray[np.int64]]:
    """Return the clusters' numbers, without gaps; by default each item is a cluster."""
    given = [np.arange(np.size(stratum)) for stratum in differences] if clusters is None else clusters
    return [np.unique(np.asarray(cluster), return_inverse=True)[1] for cluster in given]


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
