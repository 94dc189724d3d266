import math
import warnings

import numpy as np
import pytest
from scipy import stats

from moa_eval.training.intervals import difference


def losses(count, seed):
    return np.random.default_rng(seed).normal(0.5, 0.02, count)


def by_seed(values, first=0):
    return {first + seed: value for seed, value in enumerate(values)}


@pytest.mark.parametrize("comparisons", [1, 2, 5])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_equal_seeds_have_the_paired_t_interval(seeds, comparisons):
    a, b = losses(seeds, 0), losses(seeds, 1)
    found = difference(by_seed(a), by_seed(b), comparisons)
    expected = stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / comparisons)
    assert found.paired and found.mean == pytest.approx((a - b).mean(), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


@pytest.mark.parametrize("comparisons", [1, 3])
@pytest.mark.parametrize(("seeds", "baseline_seeds"), [(2, 2), (2, 5), (9, 7)])
def test_other_seeds_have_welchs_interval(seeds, baseline_seeds, comparisons):
    a, b = losses(seeds, 0), losses(baseline_seeds, 1)
    found = difference(by_seed(a, first=100), by_seed(b), comparisons)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 0.05 / comparisons)
    assert not found.paired
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_one_seed_has_a_difference_but_no_interval():
    found = difference({0: 0.5}, {0: 0.6, 1: 0.7})
    assert found.mean == pytest.approx(-0.15)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.excludes_zero


@pytest.mark.parametrize("first", [0, 10], ids=["paired", "welch"])
def test_seeds_without_spread_have_an_interval_of_zero_width(first):
    with warnings.catch_warnings(action="error"):
        found = difference({0: 0.5, 1: 0.5}, by_seed([0.75, 0.75], first))
    assert found[:3] == (-0.25, -0.25, -0.25) and found.excludes_zero
