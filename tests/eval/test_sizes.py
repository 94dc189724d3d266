"""Baselines, labels and tables of models of several sizes."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_eval.training.grouping import Draft, assign_baselines, assign_families, compare
from moa_eval.training.reading import read_run
from moa_eval.training.tables import cost_rows, loss_rows, run_rows
from moa_train.errors import ConfigError


def config(ffn, size="dense-0.12b", **args):
    return {"model": {"ffn": ffn, "size": size, "args": args}}


def assign(configs):
    """Return positions of baselines (None for a baseline) and the families as numbers."""
    drafts = [Draft([SimpleNamespace(config=own)]) for own in configs]
    assign_families(drafts)
    assign_baselines(drafts)
    families = [*dict.fromkeys(draft.family for draft in drafts)]
    baselines = [drafts.index(draft.baseline) if draft.baseline else None for draft in drafts]
    return baselines, [families.index(draft.family) for draft in drafts]


@given(st.permutations([(ffn, size) for ffn in ("swiglu", "qdmoa", "onemoa") for size in ("a", "b", "c")]))
def test_over_sizes_the_first_ffn_is_the_baseline_at_each_size(pairs):
    ffn, ffns = pairs[0][0], [*dict.fromkeys(own for own, _ in pairs)]
    baselines, families = assign([config(*pair) for pair in pairs])
    assert baselines == [None if own == ffn else pairs.index((ffn, size)) for own, size in pairs]
    assert families == [ffns.index(own) for own, _ in pairs]


def test_a_further_size_is_an_alternative_until_another_ffn_has_it():
    alone = [config("swiglu", "a"), config("qdmoa", "a"), config("swiglu", "b")]
    assert assign(alone)[0] == [None, 0, 0]
    assert assign([*alone, config("qdmoa", "b")])[0] == [None, 0, None, 2]
    assert assign([*alone, config("qdmoa", "b"), config("qdmoa", "c")])[0] == [None, 0, None, 2, 0]


def test_a_widened_baseline_is_a_family():
    shapes = [("swiglu", {}), ("swiglu", {"intermediate_size": 99}), ("qdmoa", {})]
    configs = [config(ffn, size, **args) for size in ("a", "b") for ffn, args in shapes]
    assert assign(configs) == ([None, 0, 0, None, 3, 3], [0, 1, 2, 0, 1, 2])


def test_widths_that_go_with_the_size_do_not_split_a_family():
    shapes = [{"num_hidden_layers": n, "hidden_size": 64 * n, "intermediate_size": 170 * n} for n in (2, 3)]
    configs = [config(ffn, "dense-tiny", **shape) for shape in shapes for ffn in ("swiglu", "qdmoa")]
    assert assign(configs) == ([None, 0, None, 2], [0, 1, 0, 1])


@pytest.fixture
def ladder(make_run):
    """SwiGLU and qd-MoA at two sizes, with budgets and batches that go with the size."""
    folders = [
        make_run(
            f"{size}_{ffn}", ffn=ffn, final=final - gain, steps=steps, mixing=mixing,
            changes={"model.size": size, "schedule.batch_size": batch},
        )
        for size, final, steps, batch in (("dense-0.12b", 3.2, 40, 1), ("dense-0.25b", 3.0, 60, 2))
        for ffn, gain, mixing in (("swiglu", 0.0, 0), ("qdmoa", 0.05, 5000))
    ]  # fmt: skip
    return [read_run(folder) for folder in folders]


def test_labels_name_the_size(ladder):
    comparison = compare(ladder)
    labels = ["SwiGLU, dense-0.12b", "qd-MoA, dense-0.12b", "SwiGLU, dense-0.25b", "qd-MoA, dense-0.25b"]
    assert [own.label for own in comparison.methods] == labels
    assert [own.name for own in comparison.methods] == ["SwiGLU", "qd-MoA"] * 2
    assert [own.baseline and own.baseline.label for own in comparison.methods] == [None, labels[0], None, labels[2]]
    assert compare(ladder, baseline="qdmoa").methods[0].label == labels[1]
    with pytest.raises(ConfigError, match="--baseline gelu"):
        compare(ladder, baseline="gelu")


def test_differences_are_to_the_baseline_of_the_same_size(ladder):
    comparison = compare(ladder)
    final = [run.validation["loss"][-1] for run in comparison.runs]
    expected = [final[1] - final[0], final[3] - final[2]]
    assert [row["loss_difference"] for row in loss_rows(comparison)[1::2]] == expected
    runs = run_rows(comparison)
    assert [row["final_loss_difference"] for row in runs[1::2]] == expected
    assert [row["is_baseline"] for row in runs] == [True, False, True, False]
    assert [row["parameters_ratio"] for row in cost_rows(comparison)] == [1, 1.005, 1, 1.005]


def test_the_budget_may_differ_between_sizes_but_not_within(ladder, make_run):
    assert compare(ladder).incomparable == ()
    other = make_run("other", ffn="gelu", steps=50, changes={"model.size": "dense-0.25b", "schedule.batch_size": 2})
    (reason,) = compare([*ladder, read_run(other)]).incomparable
    assert reason.startswith("tokens seen: ") and "dense-0.12b" not in reason
    text = make_run("text", ffn="gelu", changes={"data.train": "other"})
    assert [own.split(":")[0] for own in compare([*ladder, read_run(text)]).incomparable] == ["data.train"]


def test_budgets_in_different_units_are_compared_by_tokens_seen(make_run):
    tokens = {"schedule.tokens_per_parameter": None, "schedule.tokens": 2560}
    runs = [
        read_run(make_run("a", ffn="swiglu")),
        read_run(make_run("b", ffn="swiglu", changes=tokens | {"model.size": "llama-large"})),
    ]
    assert compare(runs).incomparable == ()
    assert [own.label for own in compare(runs).methods] == ["SwiGLU, dense-0.12b", "SwiGLU, llama-large"]
    runs.append(read_run(make_run("c", ffn="gelu", changes={"schedule.tokens_per_parameter": 100})))
    assert [own.split(":")[0] for own in compare(runs).incomparable] == ["schedule.tokens_per_parameter"]
