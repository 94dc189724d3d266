import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from moa_eval.page import formatting
from moa_eval.training.comparison import NotComparableError, compare, config_difference, difference, role
from moa_eval.training.runs import read_run

scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "x", "absent"])
values = st.recursive(
    scalars | st.lists(scalars, max_size=2),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def leaves(tree, path=()):
    if isinstance(tree, dict) and (tree or not path):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [path]


def look_up(tree, path):
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return "absent"
        tree = tree[key]
    return "absent" if isinstance(tree, dict) and tree else tree


def has(tree, path):
    return path in leaves(tree)


@given(st.lists(configs, min_size=1, max_size=3))
def test_the_config_difference_is_every_leaf_that_is_not_everywhere_the_same(trees):
    expected = {}
    for path in {path for tree in trees for path in leaves(tree)}:
        found = [look_up(tree, path) for tree in trees]
        if len({(has(tree, path), repr(value)) for tree, value in zip(trees, found, strict=True)}) > 1:
            expected[".".join(path)] = found
    result = config_difference(trees)
    assert result.keys() == expected.keys()
    assert {key: repr(value) for key, value in result.items()} == {
        key: repr(value) for key, value in expected.items()
    }


def test_the_config_difference_keeps_the_order_of_the_configuration():
    assert list(config_difference([{"z": 1, "a": {"y": 1, "b": 1}}, {"z": 2, "a": {"y": 2, "b": 2}}])) == [
        "z",
        "a.y",
        "a.b",
    ]


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_paired_interval_is_students(seeds):
    rng = np.random.default_rng(seeds)
    a, b = rng.normal(0.5, 0.01, seeds), rng.normal(0.52, 0.01, seeds)
    found = difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.paired
    assert found.mean == pytest.approx((a - b).mean(), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize(("seeds", "baseline_seeds"), [(2, 2), (3, 2), (2, 5), (9, 7)])
def test_the_interval_for_other_seeds_is_welchs(seeds, baseline_seeds):
    rng = np.random.default_rng([seeds, baseline_seeds])
    a, b = rng.normal(0.5, 0.02, seeds), rng.normal(0.52, 0.01, baseline_seeds)
    found = difference({100 + seed: loss for seed, loss in enumerate(a)}, dict(enumerate(b)))
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert not found.paired
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_two_paired_seeds_use_the_tables_quantile():
    found = difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})  # differences 1 and 3: mean 2, standard error 1
    assert (found.low, found.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_one_seed_has_a_difference_but_no_interval():
    found = difference({0: 0.5}, {0: 0.6, 1: 0.7})
    assert found.mean == pytest.approx(-0.15)
    assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("seed", [0, 10])
def test_seeds_without_spread_give_an_interval_without_width(seed):
    with warnings.catch_warnings(action="error"):
        found = difference({0: 0.5, 1: 0.5}, {seed: 0.75, seed + 1: 0.75})
    assert found[:3] == (-0.25, -0.25, -0.25)


def test_runs_that_differ_in_seed_and_bookkeeping_are_one_arm(make_run):
    folders = [
        make_run("s0", seed=0),
        make_run("m0", seed=0, encoder="vit_tiny_patch4_qdmoa"),
        make_run("s1", seed=1, changes={"data.workers": 0, "loop.log_every": 5, "loop.micro_batch_size": 8}),
        make_run("m1", seed=1, encoder="vit_tiny_patch4_qdmoa"),
        make_run("hot", seed=0, encoder="vit_tiny_patch4_qdmoa", lr=1.2e-3),
    ]
    comparison = compare([read_run(folder) for folder in folders])
    assert [arm.runs for arm in comparison.arms] == [(0, 2), (1, 3), (4,)]
    assert [arm.label for arm in comparison.arms] == ["SwiGLU", "qd-MoA, lr 3e-4", "qd-MoA, lr 1.2e-3"]
    assert comparison.labels == (
        "SwiGLU, seed 0", "qd-MoA, lr 3e-4, seed 0", "SwiGLU, seed 1", "qd-MoA, lr 3e-4, seed 1", "qd-MoA, lr 1.2e-3",
    )  # fmt: skip
    assert comparison.incomparable == ()


def test_labels_are_unique_even_for_the_same_run_twice(make_run):
    folders = [make_run("a/same", changes={"name": "x"}), make_run("b/same", changes={"name": "x"})]
    comparison = compare([read_run(folder) for folder in folders])
    assert len(set(comparison.labels)) == 2
    with pytest.raises(NotComparableError, match="given 2 times"):
        compare([read_run(folders[0]), read_run(folders[0])])


@pytest.mark.parametrize(
    ("key", "pair", "expected"),
    [
        ("name", ["a", "b"], "identity"),
        ("seed", [0, 1], "identity"),
        ("optim.lr", [1e-3, 2e-3], "peak rate"),
        ("optim.weight_decay", [0.0, 0.1], "setting"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_base_patch16_moa"], "FFN"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_tiny_patch16_swiglu"], "setting"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_base_patch8_swiglu"], "must match"),
        ("model.encoder_args.ffn_gate", ["tanh", "sigmoid"], "FFN"),
        ("model.encoder_args.patch_size", [4, 8], "must match"),
        ("model.img_size", [32, 64], "must match"),
        ("data.train", ["a", "b"], "must match"),
        ("data.workers", [0, 4], "bookkeeping"),
        ("loop.val_samples", [None, 10], "must match"),
        ("loop.precision", ["bf16", "float32"], "setting"),
        ("schedule.batch_size", [64, 128], "must match"),
    ],
)
def test_what_a_differing_key_means(key, pair, expected):
    assert role(key, pair) == expected


def test_incomparable_runs_are_named_by_key_and_refused_when_strict(make_run):
    changes = {"data.train": "other", "schedule.epochs": 20.0, "schedule.batch_size": 32, "model.mask_ratio": 0.5}
    runs = [read_run(make_run("a")), read_run(make_run("b", encoder="vit_tiny_patch4_qdmoa", changes=changes))]
    comparison = compare(runs)
    text = "\n".join(comparison.incomparable)
    assert "data.train: shards/train (SwiGLU), other (qd-MoA)" in text
    assert "schedule.epochs: 10 (SwiGLU), 20 (qd-MoA)" in text
    assert "schedule.batch_size: 64 (SwiGLU), 32 (qd-MoA)" in text
    assert "model.mask_ratio: 0.75 (SwiGLU), 0.5 (qd-MoA)" in text
    with pytest.raises(NotComparableError, match=r"data\.train"):
        compare(runs, strict=True)


def test_another_budget_in_fact_is_found_without_a_differing_key(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", steps=30, status="stopped"))]
    (reason,) = compare(runs).incomparable
    assert reason.replace("\u202f", "") == "images seen: 2560 (SwiGLU, seed 0, a), 1920 (SwiGLU, seed 0, b)"


@pytest.mark.parametrize(("tile", "words"), [("original", "pixels of 1"), ("masked", "mask of 1")])
def test_other_pixels_or_masks_are_found_in_the_pictures(make_run, tile, words):
    folders = [make_run("a"), make_run("b", encoder="vit_tiny_patch4_qdmoa", keys=("images/a", "images/b"))]
    assert compare([read_run(folder) for folder in folders]).incomparable == ()  # matched by key, not by order
    Image.new("RGB", (16, 16)).save(folders[1] / f"reconstructions/01_{tile}.png")
    (reason,) = compare([read_run(folder) for folder in folders]).incomparable
    assert reason == f"{words} held-out images, such as images/b: qd-MoA differs from SwiGLU"


def test_a_contrast_is_taken_at_the_last_validation_that_all_share(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", encoder="vit_tiny_patch4_qdmoa", steps=30, status=None))]
    (contrast,) = compare(runs).contrasts("loss_norm")
    assert contrast.samples == 30 * 64
    assert contrast.interval.mean == runs[1].validation["loss_norm"][2] - runs[0].validation["loss_norm"][2]


def test_a_seed_that_was_run_twice_is_one_observation(make_run):
    again = {"name": "other"}
    runs = [
        read_run(make_run(name, encoder=f"vit_tiny_patch4_{ffn}", seed=seed, final=final, changes=again))
        for name, ffn, seed, final in [("a", "gelu", 0, 0.5), ("b", "moa", 0, 0.4), ("c", "moa", 0, 0.6)]
    ]
    (contrast,) = compare(runs).contrasts("loss_norm")
    assert contrast.values == {0: pytest.approx(np.mean([run.validation["loss_norm"][-1] for run in runs[1:]]))}


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        (formatting.loss, 0.51239, "0.5124"),
        (formatting.loss, 0.0123456, "0.01235"),
        (formatting.loss, math.nan, "NaN"),
        (formatting.signed, -0.01234, "−0.0123"),
        (formatting.signed, 0.5, "+0.5000"),
        (formatting.signed, math.nan, "–"),
        (formatting.percent, -0.01234, "−1.23 %"),
        (formatting.percent, 0.25, "+25.0 %"),
        (formatting.share, 0.000306, "0.031 %"),
        (formatting.share, 0.0, "0.00 %"),
        (formatting.ratio, 1.0031, "1.003×"),
        (formatting.ratio, 0.91, "0.91×"),
        (formatting.count, 86_567_656, "86.6 M"),
        (formatting.count, 999_999, "1.00 M"),
        (formatting.count, 512, "512"),
        (formatting.count, 0, "0"),
        (formatting.grouped, 128_000, "128\u202f000"),
        (formatting.duration, 4.25, "4.25 s"),
        (formatting.duration, 250, "4 min 10 s"),
        (formatting.duration, 11_100, "3 h 05 min"),
        (formatting.duration, 200_000, "2 d 7 h"),
        (formatting.rate, 0.0012, "1.2e-3"),
        (formatting.rate, 3e-4, "3e-4"),
        (formatting.rate, 0.05, "0.05"),
    ],
)
def test_numbers_as_a_reader_sees_them(text, value, expected):
    assert text(value) == expected
