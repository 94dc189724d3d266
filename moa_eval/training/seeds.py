"""Losses by seed: means, deviations, and differences with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from moa_eval.training.runs import Run

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean difference over seeds and its two-sided confidence interval (NaN limits for fewer than two seeds)."""

    mean: float
    low: float
    high: float
    paired: bool


def mean(values: Any) -> float:
    """The mean of some numbers, NaN for none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def quotient(value: float, baseline: float) -> float:
    """Their quotient, NaN for a baseline of zero."""
    return value / baseline if baseline else math.nan


def deviation(values: Any) -> float:
    """The standard deviation (n - 1) of some numbers, NaN for fewer than two."""
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def difference(values: Mapping[int, float], baseline: Mapping[int, float], comparisons: int = 1) -> Interval:
    """The mean difference of two arms' losses by seed, with Student's interval at `CONFIDENCE`.

    Equal sets of seeds are paired (they share the order of the data, the crops and the masks): the t interval of the
    differences. Other sets: Welch's t interval (Welch 1947, "The generalization of Student's problem"). With several
    `comparisons` the interval is so wide that all of them together hold at `CONFIDENCE` (Dunn 1961, "Multiple
    comparisons among means").
    """
    a, b = np.array([*values.values()]), np.array([*baseline.values()])
    paired = values.keys() == baseline.keys()
    centre = mean(a) - mean(b)
    if min(len(a), len(b)) < 2:
        return Interval(centre, math.nan, math.nan, paired)
    if paired:
        squares = [np.var([values[seed] - baseline[seed] for seed in values], ddof=1) / len(a)]
        freedom = len(a) - 1.0
    else:
        squares = [np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)]
        spread = squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1)
        freedom = sum(squares) ** 2 / spread if spread > 0 else len(a) + len(b) - 2.0
    half = float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * comparisons))) * math.sqrt(sum(squares))
    return Interval(centre, centre - half, centre + half, paired)


def by_seed(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    """One value per run -> one per seed: a seed that was run twice is one observation, not two."""
    pairs = list(zip([run.seed for run in runs], values, strict=True))
    return {seed: mean(value for own, value in pairs if own == seed) for seed in sorted({own for own, _ in pairs})}
