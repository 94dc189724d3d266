import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from moa_eval.page import formatting
from moa_eval.page.formatting import spell
from moa_eval.training.comparison import NotComparableError, compare
from moa_eval.training.configuration import config_difference, role
from moa_eval.training.reading import read_run
from moa_eval.training.seeds import difference
from moa_train.config import RESUME_MUTABLE_KEYS

scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "x", "absent"])
values = st.recursive(
    scalars | st.lists(scalars, max_size=2),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [path]


def look_up(tree, path):
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return "absent"
        tree = tree[key]
    return "absent" if isinstance(tree, dict) else tree


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
    assert {key: repr(value) for key, value in result.items()} == {key: repr(value) for key, value in expected.items()}


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
    assert [arm.runs for arm in comparison.arms] == [(0, 1), (2, 3), (4,)]
    assert [arm.label for arm in comparison.arms] == ["SwiGLU", "qd-MoA, lr 3e-4", "qd-MoA, lr 1.2e-3"]
    assert comparison.labels == (
        "SwiGLU, seed 0", "SwiGLU, seed 1", "qd-MoA, lr 3e-4, seed 0", "qd-MoA, lr 3e-4, seed 1", "qd-MoA, lr 1.2e-3",
    )  # fmt: skip
    assert [run.name for run in comparison.runs] == ["s0", "s1", "m0", "m1", "hot"]
    assert comparison.incomparable == ()


def sweep(make_run, finals):
    """Runs by (FFN, rate, seed) with their final losses."""
    return [
        read_run(make_run(f"{ffn}_{rate}_{seed}", encoder=f"vit_tiny_patch4_{ffn}", lr=rate, seed=seed, final=final))
        for (ffn, rate, seed), final in finals.items()
    ]


def test_arms_that_differ_in_rate_are_one_contender_and_the_lowest_mean_is_its_best(make_run):
    losses = {
        1e-3: (0.40, 0.56),
        2e-3: (0.45, 0.47),
        4e-3: (0.50, 0.51),
    }  # the lowest single loss is not the lowest mean
    finals = {("swiglu", 1e-3, 0): 0.5, ("swiglu", 1e-3, 1): 0.5}
    finals |= {("qdmoa", rate, seed): final for rate, own in reversed(losses.items()) for seed, final in enumerate(own)}
    comparison = compare(sweep(make_run, finals))
    assert [(own.label, own.arms, own.best, own.chosen) for own in comparison.contenders] == [
        ("SwiGLU", (0,), 0, False), ("qd-MoA", (1, 2, 3), 2, True),
    ]  # fmt: skip
    assert [(arm.label, arm.rate, arm.runs) for arm in comparison.arms] == [
        ("SwiGLU", 1e-3, (0, 1)), ("qd-MoA, lr 1e-3", 1e-3, (2, 3)), ("qd-MoA, lr 2e-3", 2e-3, (4, 5)),
        ("qd-MoA, lr 4e-3", 4e-3, (6, 7)),
    ]  # fmt: skip
    assert [comparison.contender_of(run) for run in range(8)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert comparison.best_run(1) == 4
    (contrast,) = comparison.contrasts("loss_norm")
    assert (contrast.arm, contrast.reference) == (2, 0)
    assert contrast.interval.mean == pytest.approx(-0.04, abs=0.01)
    assert [(own.arm, own.reference) for own in comparison.equal_rates("loss_norm")] == [(1, 0)]


def test_a_rate_at_which_a_run_diverged_or_fell_short_is_not_the_best(make_run):
    runs = [read_run(make_run("base"))]
    moa = {"encoder": "vit_tiny_patch4_qdmoa"}
    runs += [read_run(make_run(f"hot{seed}", **moa, lr=4e-3, seed=seed, final=0.1)) for seed in (0, 1)]
    runs += [read_run(make_run("bad", **moa, lr=2e-3, final=0.1, nan_from=35))]
    runs += [read_run(make_run("short", **moa, lr=1e-3, final=0.1, steps=30, status="stopped"))]
    runs += [read_run(make_run("fine", **moa, lr=5e-4, final=0.4))]
    runs[1] = read_run(make_run("diverging", **moa, lr=4e-3, seed=3, final=0.1, nan_from=38))
    comparison = compare(runs)
    contender = comparison.contenders[1]
    assert contender.best is not None and comparison.arms[contender.best].rate == 5e-4
    assert comparison.incomparable == ()  # the short run's rate is not compared
    worse = compare([runs[0], runs[1], runs[3]])
    assert worse.contenders[1].best is None
    assert worse.contrasts("loss_norm") == []


def test_an_unfinished_seed_neither_moves_the_best_rate_nor_enters_the_difference(make_run):
    finals = {("swiglu", 1e-3, 0): 0.5, ("qdmoa", 1e-3, 0): 0.45, ("qdmoa", 2e-3, 0): 0.4}
    runs = sweep(make_run, finals)
    before = compare(runs)
    runs.append(read_run(make_run("s", encoder="vit_tiny_patch4_qdmoa", lr=2e-3, seed=1, steps=30, status=None)))
    after = compare(runs)
    assert [own.best for own in after.contenders] == [own.best for own in before.contenders] == [0, 2]
    assert [after.falls_short(run) for run in range(4)] == [False, False, False, True]
    assert after.contrasts("loss_norm") == before.contrasts("loss_norm")
    assert after.equal_rates("loss_norm") == before.equal_rates("loss_norm")
    assert after.incomparable == ()


def test_the_baseline_can_be_named(make_run):
    runs = sweep(make_run, {("qdmoa", 1e-3, 0): 0.5, ("swiglu", 1e-3, 0): 0.5, ("swiglu", 2e-3, 0): 0.4})
    assert compare(runs).contenders[0].label == "qd-MoA"
    for name in ("SwiGLU", "swiglu", "swiglu_0.002_0", str(runs[1].folder)):
        comparison = compare(runs, baseline=name)
        assert [own.label for own in comparison.contenders] == ["SwiGLU", "qd-MoA"], name
        assert comparison.contenders[0].best == 1
    assert compare(runs, baseline=["gelu", "swiglu", "qdmoa"]).contenders[0].label == "SwiGLU"
    with pytest.raises(
        NotComparableError, match="--baseline gelu is none of the contenders; give one of: qd-MoA; SwiGLU"
    ):
        compare(runs, baseline="gelu")


def test_figures_show_the_best_arms_when_there_are_many_runs(make_run):
    finals = {("swiglu", 1e-3, seed): 0.5 for seed in range(2)}
    finals |= {("qdmoa", rate, seed): 0.4 + 40 * rate for rate in (1e-3, 2e-3, 4e-3) for seed in range(2)}
    few = sweep(make_run, finals)
    assert compare(few).shown == tuple(range(8))
    more = compare([*few, *sweep(make_run, {("qdmoa", 8e-3, 0): 0.9})])
    assert more.shown == (0, 1, 2, 3)
    assert {more.arm_of(run) for run in more.shown} == {0, 1}


def test_contenders_of_one_ffn_are_told_apart_by_what_they_set(make_run):
    changes = [{}, {"ffn_mixing_gate": "tanh"}, {"ffn_up_activations": "id,r2"}, {"mlp_ratio": 5.0}]
    runs = [
        read_run(
            make_run(f"r{i}_{rate}", encoder="vit_tiny_patch4_qdmoa", lr=rate, changes={"model.encoder_args": own})
        )
        for i, own in enumerate(changes)
        for rate in (1e-3, 2e-3)
    ]
    comparison = compare(runs)
    assert [own.label for own in comparison.contenders] == [
        "qd-MoA", "qd-MoA, gate tanh", "qd-MoA, up_activations id,r2", "qd-MoA, mlp_ratio 5",
    ]  # fmt: skip
    # An empty dictionary differs from one with an FFN's setting in that setting alone.
    assert {role(key, values) for key, values in comparison.differing.items()} == {"identity", "FFN", "peak rate"}
    assert comparison.labels[3] == "qd-MoA, gate tanh, lr 2e-3"


def test_language_models_and_autoencoders_need_sections_of_their_own(make_run):
    runs = [read_run(make_run("lm", ffn="swiglu")), read_run(make_run("mae"))]
    with pytest.raises(NotComparableError, match=r"lm is a language model and .*mae a masked autoencoder"):
        compare(runs)


def test_language_models_are_compared_in_cross_entropy(make_run):
    runs = [read_run(make_run(ffn, ffn=ffn, final=final)) for ffn, final in (("swiglu", 3.2), ("qdmoa", 3.1))]
    comparison = compare(runs)
    assert comparison.metric == "loss"
    assert [own.label for own in comparison.contenders] == ["SwiGLU", "qd-MoA"]
    assert {role(key, values) for key, values in comparison.differing.items()} == {"identity", "FFN"}
    (contrast,) = comparison.contrasts("loss")
    assert contrast.interval.mean == runs[1].validation["loss"][-1] - runs[0].validation["loss"][-1]


@pytest.mark.parametrize("comparisons", [1, 2, 5])
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "welch"])
def test_the_interval_for_several_comparisons_has_bonferronis_level(comparisons, paired):
    rng = np.random.default_rng(comparisons)
    a, b = rng.normal(0.5, 0.02, 4), rng.normal(0.52, 0.01, 4)
    found = difference(dict(enumerate(a)), {seed + 10 * (not paired): loss for seed, loss in enumerate(b)}, comparisons)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    expected = test.confidence_interval(1 - 0.05 / comparisons)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_of_many_runs_with_one_value_the_first_are_named():
    labels = [f"r{index}" for index in range(9)]
    assert spell(labels, ["10"] * 5 + ["20"] * 4) == "10 (r0, r1, r2, r3, r4), 20 (r5, r6, r7, r8)"
    assert spell(labels, ["10"] * 9) == "10 (r0, r1, r2, r3 and 5 more)"


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
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_tiny_patch16_swiglu"], "size"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_base_patch8_swiglu"], "must match"),
        ("model.encoder_args.ffn_mixing_gate", ["tanh", "sigmoid"], "FFN"),
        ("model.encoder_args.mlp_ratio", [4.0, 5.0], "FFN"),
        ("model.ffn", ["swiglu", "qdmoa"], "FFN"),
        ("model.size", ["dense-0.12b", "dense-0.5b"], "size"),
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


@pytest.mark.parametrize("key", sorted(RESUME_MUTABLE_KEYS))
def test_what_a_run_may_be_resumed_with_matters_to_no_comparison(key):
    assert role(key, [1, 2]) in ("identity", "bookkeeping")


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
    moa = {"encoder": "vit_tiny_patch4_qdmoa"}
    runs = [read_run(make_run("a")), read_run(make_run("b", **moa, steps=30, status="stopped"))]
    (reason,) = compare(runs).incomparable
    assert reason.replace("\u202f", "") == "images seen: 2560 (SwiGLU), 1920 (qd-MoA)"


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
    assert contrast.seen == 30 * 64
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
