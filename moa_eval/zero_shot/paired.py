"""Two models on the same items: is the difference of their scores more than the luck of which items were asked?

Everything here works on differences item by item (one minus the other), in one or several strata. A stratum is a
task; the statistic is the mean over strata of each stratum's mean difference, which for the four zero-shot tasks is
the difference of the two averages. Results are in the scores' own unit: for accuracies, fractions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, gammaln, ndtri

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
SEED = 0

_CHUNK = 2_000_000  # numbers held at once while resampling (16 MB)

Scores = NDArray[np.float64]
Counts = NDArray[np.int64]


class Table(NamedTuple):
    """The 2 x 2 table of two models' right and wrong answers to the same items.

    Attributes:
        both, first, second, neither: Number of items that both, only the first, only the second, or none got right.
    """

    both: int
    first: int
    second: int
    neither: int


class Interval(NamedTuple):
    """A two-sided interval at `CONFIDENCE`."""

    low: float
    high: float


def table(first: ArrayLike, second: ArrayLike) -> Table:
    """Count how two models' answers (N,) fall together.

    Raises:
        ValueError: The two differ in length, or hold other values than 0 and 1.
    """
    a, b = _pair(first, second)
    if not is_binary(a) or not is_binary(b):
        raise ValueError("first and second must hold 0 and 1 only: other scores have no 2 x 2 table")
    return Table(
        int(np.sum((a == 1) & (b == 1))), int(np.sum((a == 1) & (b == 0))),
        int(np.sum((a == 0) & (b == 1))), int(np.sum((a == 0) & (b == 0))),
    )  # fmt: skip


def is_binary(scores: ArrayLike) -> bool:
    """Whether all scores are 0 or 1."""
    values = np.asarray(scores)
    return bool(np.all((values == 0) | (values == 1)))


def mcnemar(first: int, second: int) -> float:
    """Two-sided p of the exact McNemar test from the two discordant counts; 1 where nothing is discordant.

    Given the number of items that only one model got right, each model is equally likely to be that one if they are
    equally good: twice the smaller tail of Binomial(first + second, 1/2), at most 1. Source: McNemar (1947), "Note on
    the sampling error of the difference between correlated proportions or percentages", in its exact binomial form.

    Raises:
        ValueError: A count is negative.
    """
    if min(first, second) < 0:
        raise ValueError(f"discordant counts must not be negative, got {first} and {second}")
    return min(1.0, 2.0 * float(bdtr(float(min(first, second)), first + second, 0.5)))


def stratified_mcnemar(first: Sequence[int], second: Sequence[int], sizes: Sequence[int]) -> float:
    """Two-sided exact p for the mean over strata of (first - second) / size; for one stratum that of `mcnemar`.

    Under the null hypothesis each discordant item of each stratum falls to either side with probability 1/2, so the
    statistic is a sum of independent centred binomials with weights 1 / size. Its tail is summed over all outcomes,
    in whole numbers (multiples of 1 / lcm(sizes)), so that outcomes as extreme as the observed one are found exactly.
    It is the permutation test that swaps two models' answers item by item (Fisher 1935, "The Design of Experiments").

    Args:
        first, second: Items per stratum that only the first, or only the second, model got right.
        sizes: Items per stratum, concordant ones included.

    Raises:
        ValueError: The lengths differ, a count is negative or exceeds its stratum, or there is no stratum.
    """
    if not len(first) == len(second) == len(sizes) or not sizes:
        numbers = f"{len(first)}, {len(second)}, {len(sizes)}"
        raise ValueError(f"first, second and sizes must be equally many and at least one, got {numbers}")
    for a, b, size in zip(first, second, sizes, strict=True):
        if min(a, b) < 0 or a + b > size or size < 1:
            raise ValueError(f"discordant counts {a} and {b} do not fit into a stratum of {size} items")
    unit = math.lcm(*sizes)
    weights = [unit // size for size in sizes]
    if unit * len(sizes) >= 2**62:  # beyond 64-bit integers; the four tasks need 2**40
        raise ValueError(f"sizes {tuple(sizes)} have too large a common multiple ({unit})")
    observed = abs(sum(weight * (a - b) for weight, a, b in zip(weights, first, second, strict=True)))
    if observed == 0:
        return 1.0
    # The larger strata's outcomes are spread over two sides that are then met in the middle: a product of four
    # binomials has too many outcomes to list, the products of two and two do not.
    sides: list[tuple[Counts, Scores]] = [(np.zeros(1, np.int64), np.ones(1)) for _ in range(2)]
    numbers = sorted(zip((a + b for a, b in zip(first, second, strict=True)), weights, strict=True), reverse=True)
    for number, weight in numbers:
        smaller = min((0, 1), key=lambda side: len(sides[side][0]))
        sides[smaller] = _add(sides[smaller], number, weight)
    (left, left_mass), (right, right_mass) = sides
    tail = np.concatenate([[0.0], np.cumsum(right_mass)])
    at_most = tail[np.searchsorted(right, -observed - left, side="right")]  # the null is symmetric: one tail, twice
    return min(1.0, 2.0 * float(left_mass @ at_most))


def bootstrap(differences: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Percentile bootstrap interval of the mean over strata of each stratum's mean difference.

    Items are drawn with replacement within each stratum, both models' scores together. Drawing N items is drawing how
    often each distinct difference occurs, a multinomial: the same distribution, at a cost that does not grow with N
    for right-or-wrong scores. Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13.

    Args:
        differences: Per stratum the differences (N,), one minus the other, paired by item.
        resamples: Number of resamples.
        seed: Seed of the generator; equal seeds give equal intervals.

    Raises:
        ValueError: There is no stratum, or one is empty or not finite; or `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for stratum in _strata(differences):
        values, counts = np.unique(stratum, return_counts=True)
        step = max(1, _CHUNK // len(values))
        for start in range(0, resamples, step):
            part = means[start : start + step]
            drawn = generator.multinomial(len(stratum), counts / len(stratum), size=len(part))
            part += drawn @ values / (len(stratum) * len(differences))
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(float(low), float(high))


def mean_difference(differences: Sequence[ArrayLike]) -> float:
    """The mean over strata of each stratum's mean difference.

    Raises:
        ValueError: There is no stratum, or one is empty or not finite.
    """
    return math.fsum(math.fsum(stratum) / len(stratum) for stratum in _strata(differences)) / len(differences)


def standard_error(differences: Sequence[ArrayLike]) -> float:
    """Standard error of `mean_difference`: sqrt(sum of s^2 / N over strata) / strata; NaN for a stratum of one item.

    Source: Miller (2024), "Adding Error Bars to Evals", arXiv:2411.00640, section on paired differences.

    Raises:
        ValueError: There is no stratum, or one is empty or not finite.
    """
    strata = _strata(differences)
    if min(map(len, strata)) < 2:
        return math.nan
    return math.sqrt(math.fsum(float(np.var(s, ddof=1)) / len(s) for s in strata)) / len(strata)


def detectable(error: float) -> float:
    """The smallest true difference that would be seen (p < 0.05, two-sided) in `POWER` of such evaluations.

    The normal approximation (z_{1 - alpha / 2} + z_power) * error, with the standard error of the paired difference:
    it holds for models that disagree with each other about as often as these. Source: as `standard_error`.
    """
    return float(ndtri(0.5 + CONFIDENCE / 2) + ndtri(POWER)) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: at most alpha where all of them together keep alpha.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".

    Raises:
        ValueError: A value lies outside [0, 1].
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Scores, Scores]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"first and second must be one-dimensional and equally long, got {a.shape} and {b.shape}")
    return a, b


def _strata(differences: Sequence[ArrayLike]) -> list[Scores]:
    strata = [np.asarray(stratum, dtype=np.float64) for stratum in differences]
    if not strata or any(s.ndim != 1 or not len(s) or not np.isfinite(s).all() for s in strata):
        raise ValueError("differences must hold at least one stratum, each one-dimensional, finite and not empty")
    return strata


def _add(side: tuple[Counts, Scores], number: int, weight: int) -> tuple[Counts, Scores]:
    """The distribution of a sum after adding weight * (2 B - number), B ~ Binomial(number, 1/2)."""
    counts = np.arange(number + 1, dtype=np.int64)
    chosen = gammaln(number + 1.0) - gammaln(counts + 1.0) - gammaln(number - counts + 1.0)
    mass = np.exp(chosen - number * math.log(2))
    values = np.add.outer(side[0], weight * (2 * counts - number)).ravel()
    masses = np.multiply.outer(side[1], mass).ravel()
    order = np.argsort(values, kind="stable")
    return values[order], masses[order]
