"""Bits per byte and probability of right answers against closed forms, and on the page."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moa_eval.zero_shot import likelihoods
from moa_eval.zero_shot.comparison import AVERAGE, compare_evaluations
from moa_eval.zero_shot.report import zero_shot_section
from moa_eval.zero_shot.results import read_evaluation


def sample(choices, target, responses=(-2.0, -3.0, -5.0), **fields):
    arguments = {f"gen_args_{i}": {"arg_0": "Q:", "arg_1": text} for i, text in enumerate(choices)}
    answers = [[str(value), "False"] for value in responses]
    return {"doc_id": 3, "target": target, "arguments": arguments, "filtered_resps": answers, "acc": 0.0, **fields}


def test_closed_form():
    found = likelihoods.measures(sample([" four", " \u00e9t\u00e9", " x"], "1"))
    assert found["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / len(" \u00e9t\u00e9".encode()))
    assert found["p_right"] == pytest.approx(math.exp(-3) / (math.exp(-2) + math.exp(-3) + math.exp(-5)))


@pytest.mark.parametrize(("acc", "right"), [(1.0, 0), (0.0, 1)])
def test_choices_of_winogrande_are_contexts(acc, right):
    found = likelihoods.measures(sample([" he left."] * 2, "he left.", (-2.0, -3.0), acc=acc))
    assert found["bits_per_byte"] == pytest.approx((2.0, 3.0)[right] / math.log(2) / len(" he left."))


@pytest.mark.parametrize(
    "other",
    [
        {"target": "a sentence"},
        {"target": "7"},
        {"arguments": [["Q:", " a"]]},
        {"filtered_resps": ["text"]},
        {"filtered_resps": [["-1.0", "False"]] * 6},  # acc_mutual_info
    ],
)
def test_other_kinds_of_samples_have_none(other):
    assert likelihoods.measures(sample([" a", " b", " c"], "0") | other) == {}


def test_clusters_of_winogrande_have_the_same_options():
    doc = {"sentence": "Ann thanked Bea because _ helped.", "option1": "Ann", "option2": "Bea"}
    twin = doc | {"option1": "Bea", "option2": "Ann"}
    assert likelihoods.cluster(sample([" a"], "0", doc=doc)) == likelihoods.cluster(sample([" a"], "0", doc=twin))
    assert likelihoods.cluster(sample([" a"], "0", doc={"query": "?"})) == "3"


def test_bits_separate_models_of_equal_accuracy(write_results, no_figures, tmp_path):
    files = [write_results(tmp_path, f"models/{name}", certainty=c) for name, c in (("base", 0.0), ("sharp", 0.1))]
    comparison = compare_evaluations([read_evaluation(file) for file in files])
    contrasts = {(c.measure.task, c.measure.metric): c for c in comparison.contrasts}
    bits, average = contrasts["arc_challenge", "bits_per_byte"], contrasts[AVERAGE, "bits_per_byte"]
    gain = 0.1 * np.tile([0.8, 0.9, 1.0, 1.1, 1.2], 8) / math.log(2) / len(" answer 0")
    assert bits.difference == pytest.approx(-gain.mean()) == average.difference
    assert bits.p_value == pytest.approx(stats.ttest_1samp(gain, 0).pvalue)
    assert average.significant and contrasts[AVERAGE, "p_right"].difference > 0
    assert contrasts[AVERAGE, "headline"].difference == 0
    verdict = zero_shot_section(files).verdict[-1]
    assert verdict.startswith(
        "The log-likelihoods separate what accuracy does not: over the same items sharp needs 0.016"
    )
