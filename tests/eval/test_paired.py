"""Paired statistics against scipy, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moa_eval.zero_shot import paired
from moa_eval.zero_shot.paired import Table


def answers(seed, size, first=0.5, second=0.5, shared=0.6):
    """Right (1) and wrong (0) answers of two models to the same items, correlated by `shared`."""
    generator = np.random.default_rng(seed)
    luck = generator.random(size)
    own = np.where(generator.random(size) < shared, luck, generator.random(size))
    return (luck < first).astype(float), (own < second).astype(float)


def tables_of(first, second, sizes):
    return [Table(0, a, b, size - a - b) for a, b, size in zip(first, second, sizes, strict=True)]


def test_table_counts_answers():
    assert paired.table([1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]) == (1, 2, 1, 3)
    assert paired.table([0.5, 1.0], [1.0, 1.0]) is None


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 6), (3, 9), (9, 3), (7, 7), (25, 40), (900, 1100), (0, 400)])
def test_single_stratum_is_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue
    assert paired.stratified_mcnemar(tables_of([first], [second], [5000])) == pytest.approx(expected, rel=1e-9)


def test_equal_answers_have_p_one():
    assert paired.stratified_mcnemar([Table(5, 0, 0, 5)]) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [
        ((3, 1), (1, 4), (7, 11)),
        ((4, 2, 3, 0), (1, 1, 0, 1), (10, 10, 10, 10)),
        ((2, 0, 5, 1), (2, 3, 1, 0), (12, 100, 7, 50)),
    ],
)
def test_strata_match_enumeration_of_all_outcomes(first, second, sizes):
    numbers = [a + b for a, b in zip(first, second, strict=True)]

    def statistic(wins):
        return abs(sum((2 * k - n) / size for k, n, size in zip(wins, numbers, sizes, strict=True)))

    expected = math.fsum(
        math.prod(math.comb(n, k) for n, k in zip(numbers, wins, strict=True)) / 2 ** sum(numbers)
        for wins in itertools.product(*(range(number + 1) for number in numbers))
        if statistic(wins) >= statistic(first) - 1e-12
    )
    assert paired.stratified_mcnemar(tables_of(first, second, sizes)) == pytest.approx(expected, rel=1e-9)


def test_strata_of_the_real_sizes_approach_the_normal_law():
    first, second, sizes = (160, 1500, 80, 200), (130, 1450, 70, 180), (1172, 10042, 500, 1267)
    scale = math.sqrt(sum((a + b) / size**2 for a, b, size in zip(first, second, sizes, strict=True)))
    shift = sum((a - b) / size for a, b, size in zip(first, second, sizes, strict=True))
    found = paired.stratified_mcnemar(tables_of(first, second, sizes))
    assert found == pytest.approx(2 * stats.norm.sf(shift / scale), rel=0.02)


def test_bootstrap_draws_within_strata():
    strata = [np.subtract(*answers(seed, size, 0.6, 0.5)) for seed, size in ((1, 400), (2, 50), (3, 130))]
    generator = np.random.default_rng(5)
    means = [s[generator.integers(0, len(s), (20_000, len(s)))].mean(axis=1) for s in strata]
    expected = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    np.testing.assert_allclose(paired.bootstrap(strata, resamples=20_000), expected, atol=0.0015)


def test_bootstrap_depends_on_seed_and_not_on_block(monkeypatch):
    scores = np.random.default_rng(0).normal(0.3, 1, 200)
    interval = paired.bootstrap([scores], resamples=500, seed=3)
    assert paired.bootstrap([scores], resamples=500, seed=4) != interval
    monkeypatch.setattr(paired, "_BLOCK", 7)
    assert paired.bootstrap([scores], resamples=500, seed=3) == pytest.approx(interval, rel=1e-12)


def test_standard_error_is_that_of_the_bootstrap():
    strata = [np.subtract(*answers(seed, 20_000, 0.42, 0.4)) for seed in (1, 2)]
    error = paired.standard_error(strata)
    expected = paired.mean_difference(strata) + error * stats.norm.ppf([0.025, 0.975])
    np.testing.assert_allclose(paired.bootstrap(strata), expected, atol=0.04 * error)


def test_standard_error_of_constant_and_single_differences():
    assert paired.standard_error([np.zeros(10)]) == 0.0
    assert math.isnan(paired.standard_error([np.ones(1)]))


def test_detectable_difference_has_power_of_80_percent():
    measured = np.random.default_rng(0).normal(paired.detectable(0.01), 0.01, 200_000)
    assert np.mean(2 * stats.norm.sf(np.abs(measured) / 0.01) < 0.05) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_holm_is_closed_testing_with_bonferroni(size):
    values = np.random.default_rng(size).random(size).round(2) ** 2
    subsets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
    expected = [max(min(1, len(s) * min(values[list(s)])) for s in subsets if i in s) for i in range(size)]
    assert paired.holm(values).tolist() == pytest.approx(expected)
