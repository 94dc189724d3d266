import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moa_eval.zero_shot import paired


def answers(seed, size, first=0.5, second=0.5, shared=0.6):
    """Two models' right and wrong answers (0 or 1) to the same items; `shared` of the items decide for both."""
    generator = np.random.default_rng(seed)
    luck = generator.random(size)
    own = np.where(generator.random(size) < shared, luck, generator.random(size))
    return (luck < first).astype(float), (own < second).astype(float)


def outcomes(numbers):
    """Every way in which the discordant items of some strata can fall, with its probability under no difference."""
    for wins in itertools.product(*(range(number + 1) for number in numbers)):
        yield wins, math.prod(math.comb(n, k) for n, k in zip(numbers, wins, strict=True)) / 2 ** sum(numbers)


def test_the_table_counts_answers():
    first, second = [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]
    assert paired.table(first, second) == (1, 2, 1, 3)
    with pytest.raises(ValueError, match="0 and 1 only"):
        paired.table([0.5], [1.0])
    with pytest.raises(ValueError, match=r"equally long, got \(2,\) and \(3,\)"):
        paired.table([0, 1], [0, 1, 1])


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 6), (3, 9), (9, 3), (7, 7), (25, 40), (900, 1100), (0, 400)])
def test_mcnemar_is_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue
    assert paired.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert paired.mcnemar(second, first) == paired.mcnemar(first, second)


def test_mcnemar_of_hand_made_tables():
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(0, 5) == 2 / 2**5
    assert paired.mcnemar(1, 4) == 2 * (1 + 5) / 2**5
    assert paired.mcnemar(2, 2) == 1.0
    with pytest.raises(ValueError, match="-1 and 3"):
        paired.mcnemar(-1, 3)


@pytest.mark.parametrize(("first", "second"), [(3, 9), (0, 5), (7, 7), (40, 60), (500, 640)])
def test_one_stratum_is_mcnemar(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue
    assert paired.stratified_mcnemar([first], [second], [5000]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [
        ((3, 1), (1, 4), (7, 11)),
        ((5, 2, 0), (1, 1, 3), (20, 9, 15)),
        ((4, 2, 3, 0), (1, 1, 0, 1), (10, 10, 10, 10)),
        ((2, 0, 5, 1), (2, 3, 1, 0), (12, 100, 7, 50)),
        ((0, 6), (0, 1), (30, 40)),
    ],
)
def test_strata_against_every_outcome(first, second, sizes):
    def statistic(wins):
        numbers = [a + b for a, b in zip(first, second, strict=True)]
        return abs(sum((2 * k - n) / size for k, n, size in zip(wins, numbers, sizes, strict=True)))

    numbers = [a + b for a, b in zip(first, second, strict=True)]
    expected = math.fsum(p for wins, p in outcomes(numbers) if statistic(wins) >= statistic(first) - 1e-12)
    assert paired.stratified_mcnemar(first, second, sizes) == pytest.approx(expected, rel=1e-9)


def test_strata_against_a_permutation_test():
    """Scipy's, which swaps the two models' answers item by item."""
    strata = [answers(seed, size, 0.56, 0.45) for seed, size in ((1, 60), (2, 25), (3, 40))]
    sizes = [len(a) for a, _ in strata]
    weight = np.repeat([1 / size for size in sizes], sizes)
    first, second = (np.concatenate(side) for side in zip(*strata, strict=True))

    def statistic(x, y, axis):
        return np.sum((x - y) * weight, axis=axis)

    found = stats.permutation_test(
        (first, second), statistic, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    ).pvalue
    tables = [paired.table(a, b) for a, b in strata]
    exact = paired.stratified_mcnemar([t.first for t in tables], [t.second for t in tables], sizes)
    assert 0.001 < exact < 0.5
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))


def test_strata_of_the_real_sizes_are_exact_and_quick():
    """Against a normal law that is good here: every task contributes hundreds of discordant items."""
    first, second, sizes = (160, 1500, 80, 200), (130, 1450, 70, 180), (1172, 10042, 500, 1267)
    scale = math.sqrt(sum((a + b) / size**2 for a, b, size in zip(first, second, sizes, strict=True)))
    shift = sum((a - b) / size for a, b, size in zip(first, second, sizes, strict=True))
    found = paired.stratified_mcnemar(first, second, sizes)
    assert found == pytest.approx(2 * stats.norm.sf(shift / scale), rel=0.02)


def test_strata_that_cannot_be_are_refused():
    for first, second, sizes, words in (
        ((1,), (2, 3), (5, 5), "equally many"),
        ((), (), (), "at least one"),
        ((4,), (4,), (7,), "do not fit into a stratum of 7"),
        ((-1,), (4,), (7,), "-1 and 4"),
        ((1, 1, 1, 1), (1, 1, 1, 1), (65521, 65519, 65497, 65479), "common multiple"),
    ):
        with pytest.raises(ValueError, match=words):
            paired.stratified_mcnemar(first, second, sizes)


def test_bootstrap_against_scipy():
    first, second = answers(0, 300, 0.6, 0.5)
    expected = stats.bootstrap(
        (first, second), lambda x, y, axis: np.mean(x - y, axis=axis), paired=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(1), batch=2000,
    ).confidence_interval  # fmt: skip
    found = paired.bootstrap([first - second], resamples=20_000)
    np.testing.assert_allclose(found, expected, atol=1.5 / 300)  # limits are multiples of one item


def test_bootstrap_of_strata_against_drawing_items():
    strata = [np.subtract(*answers(seed, size, 0.6, 0.5)) for seed, size in ((1, 400), (2, 50), (3, 130))]
    generator = np.random.default_rng(5)
    means = [s[generator.integers(0, len(s), (20_000, len(s)))].mean(axis=1) for s in strata]
    expected = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    found = paired.bootstrap(strata, resamples=20_000)
    np.testing.assert_allclose(found, expected, atol=0.0015)
    assert found.low < paired.mean_difference(strata) < found.high


def test_bootstrap_approaches_the_normal_interval():
    strata = [np.subtract(*answers(seed, 20_000, 0.42, 0.4)) for seed in (1, 2)]
    error = np.sqrt(sum(np.var(s, ddof=1) / len(s) for s in strata)) / 2
    expected = np.mean([s.mean() for s in strata]) + error * stats.norm.ppf([0.025, 0.975])
    np.testing.assert_allclose(paired.bootstrap(strata), expected, atol=0.04 * error)
    assert paired.standard_error(strata) == pytest.approx(error, rel=1e-12)


def test_bootstrap_takes_any_scores_and_is_seeded(monkeypatch):
    scores = np.random.default_rng(0).normal(0.3, 1, 200)
    whole = paired.bootstrap([scores], resamples=500, seed=3)
    expected = stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    np.testing.assert_allclose(whole, expected.confidence_interval, atol=0.05)
    assert paired.bootstrap([scores], resamples=500, seed=4) != whole
    monkeypatch.setattr(paired, "_CHUNK", 1000)  # five resamples at a time
    assert paired.bootstrap([scores], resamples=500, seed=3) == whole


def test_equal_answers_have_no_width():
    same = np.zeros(10)
    assert paired.bootstrap([same]) == (0.0, 0.0)
    assert paired.standard_error([same]) == 0.0
    assert math.isnan(paired.standard_error([np.ones(1)]))


@pytest.mark.parametrize("bad", [[], [[]], [[math.nan]], [[[1.0]]]], ids=["none", "empty", "nan", "table"])
def test_strata_without_numbers_are_refused(bad):
    for function in (paired.bootstrap, paired.mean_difference, paired.standard_error):
        with pytest.raises(ValueError, match="at least one stratum"):
            function(bad)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        paired.bootstrap([[1.0]], resamples=0)


def test_the_detectable_difference_is_seen_four_times_in_five():
    error = 0.01
    measured = np.random.default_rng(0).normal(paired.detectable(error), error, 200_000)
    assert np.mean(2 * stats.norm.sf(np.abs(measured) / error) < 0.05) == pytest.approx(0.8, abs=0.005)


def test_holm_is_closed_testing_with_bonferroni():
    generator = np.random.default_rng(0)
    for size in (1, 2, 5):
        values = generator.random(size).round(2) ** 2
        subsets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
        expected = [max(min(1, len(s) * min(values[list(s)])) for s in subsets if i in s) for i in range(size)]
        assert paired.holm(values.tolist()) == pytest.approx(expected)


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([]) == []
    with pytest.raises(ValueError, match=r"1\.2"):
        paired.holm([0.1, 1.2])
