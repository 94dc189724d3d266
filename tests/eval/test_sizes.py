"""Which contenders are compared with which, where models have several sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_eval.training.comparison import NotComparableError, compare
from moa_eval.training.configuration import WIDENED, role
from moa_eval.training.reading import read_run
from moa_eval.training.size_figures import against_parameters
from moa_eval.training.sizes import baselines, families, size_keys, sizes
from moa_eval.training.tables import cost_rows, loss_rows, parameter_rows, run_rows
from moa_lm.sizes import SIZES


def config(ffn, size="dense-0.12b", **args):
    return {"model": {"ffn": ffn, "size": size, "args": args}}


@given(st.lists(st.sampled_from(["swiglu", "qdmoa", "gelu"]), min_size=1, max_size=6))
def test_with_one_size_all_are_compared_with_the_first(ffns):
    configs = [config(ffn, ffn_mixing_gate=str(index)) for index, ffn in enumerate(ffns)]
    assert baselines(configs) == [None] + [0] * (len(ffns) - 1)
    assert set(sizes(configs)) == {0} and size_keys(configs) == []


@given(st.permutations([(ffn, size) for ffn in ("swiglu", "qdmoa", "onemoa") for size in ("a", "b", "c")]))
def test_over_sizes_each_is_compared_with_the_first_ones_ffn_at_its_own_size(pairs):
    configs = [config(*pair) for pair in pairs]
    ffn = pairs[0][0]
    expected = [None if own == ffn else pairs.index((ffn, size)) for own, size in pairs]
    assert baselines(configs) == expected
    ffns = [*dict.fromkeys(own for own, _ in pairs)]
    assert families(configs) == [ffns.index(own) for own, _ in pairs]


def test_a_lone_size_is_an_alternative_until_another_size_has_one():
    alone = [config("swiglu", "a"), config("qdmoa", "a"), config("swiglu", "b")]
    assert baselines(alone) == [None, 0, 0]
    assert baselines([*alone, config("qdmoa", "b")]) == [None, 0, None, 2]
    # Without the baseline's FFN at its size a model is compared with the first, which the page says.
    assert baselines([*alone, config("qdmoa", "b"), config("qdmoa", "c")]) == [None, 0, None, 2, 0]


def test_a_widened_baseline_is_an_alternative_of_its_own_family():
    shapes = [("swiglu", {}), ("swiglu", {"intermediate_size": 99}), ("qdmoa", {})]
    configs = [config(ffn, size, **args) for size in ("a", "b") for ffn, args in shapes]
    assert baselines(configs) == [None, 0, 0, None, 3, 3]
    assert families(configs) == [0, 1, 2, 0, 1, 2]


def test_sizes_may_be_given_as_arguments_with_the_widths_that_go_with_them():
    shapes = [{"num_hidden_layers": n, "hidden_size": 64 * n, "intermediate_size": 170 * n} for n in (2, 3)]
    configs = [config(ffn, "dense-tiny", **shape) for shape in shapes for ffn in ("swiglu", "qdmoa")]
    assert baselines(configs) == [None, 0, None, 2]
    assert families(configs) == [0, 1, 0, 1]
    assert size_keys(configs) == ["model.args.hidden_size", "model.args.num_hidden_layers"]


@pytest.mark.parametrize("widened", sorted(WIDENED))
def test_a_widened_size_has_the_shape_of_its_own_but_for_the_ffn(widened):
    wide, plain = SIZES[widened], SIZES[WIDENED[widened]]
    for field in ("layers", "width", "heads", "experts", "active_experts", "tied"):
        assert getattr(wide, field) == getattr(plain, field), field


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


def test_contenders_of_several_sizes_carry_them_in_their_labels(ladder):
    comparison = compare(ladder)
    labels = [
        "SwiGLU, dense-0.12b", "qd-MoA, dense-0.12b", "SwiGLU, dense-0.25b", "qd-MoA, dense-0.25b",
    ]  # fmt: skip
    assert [own.label for own in comparison.contenders] == labels
    assert [own.ffn for own in comparison.contenders] == ["SwiGLU", "qd-MoA"] * 2
    assert [own.baseline for own in comparison.contenders] == [None, 0, None, 2]
    assert compare(ladder, baseline="qdmoa").contenders[0].label == labels[1]
    with pytest.raises(NotComparableError, match="--baseline gelu is none"):
        compare(ladder, baseline="gelu")


def test_differences_and_ratios_are_to_the_baseline_of_the_same_size(ladder):
    comparison = compare(ladder)
    final = [run.validation["loss"][-1] for run in comparison.runs]
    rows = loss_rows(comparison)
    assert [row["baseline"] for row in rows] == ["", "SwiGLU, dense-0.12b", "", "SwiGLU, dense-0.25b"]
    assert [rows[i]["loss_difference"] for i in (1, 3)] == [final[1] - final[0], final[3] - final[2]]
    runs = run_rows(comparison)
    assert [runs[i]["final_loss_difference"] for i in (1, 3)] == [final[1] - final[0], final[3] - final[2]]
    assert [row["is_baseline"] for row in runs] == [True, False, True, False]
    assert [row["parameters_ratio"] for row in cost_rows(comparison)] == [1, 1.005, 1, 1.005]


def test_a_budget_may_go_with_the_size_but_not_with_the_ffn(ladder, make_run):
    assert compare(ladder).incomparable == ()
    other = make_run("other", ffn="gelu", steps=50, changes={"model.size": "dense-0.25b", "schedule.batch_size": 2})
    (reason,) = compare([*ladder, read_run(other)]).incomparable
    assert reason.startswith("tokens seen: ") and "dense-0.12b" not in reason
    text = make_run("text", ffn="gelu", changes={"data.train": "other"})
    assert [own.split(":")[0] for own in compare([*ladder, read_run(text)]).incomparable] == ["data.train"]


def test_a_budget_given_in_another_way_is_compared_by_what_was_seen(make_run):
    tokens = {"schedule.tokens_per_parameter": None, "schedule.tokens": 2560}
    runs = [read_run(make_run("a", ffn="swiglu")), read_run(make_run("b", ffn="qdmoa", changes=tokens))]
    assert compare(runs).incomparable == ()
    runs.append(read_run(make_run("c", ffn="gelu", changes={"schedule.tokens_per_parameter": 100})))
    assert [own.split(":")[0] for own in compare(runs).incomparable] == ["schedule.tokens_per_parameter"]


def test_another_way_to_give_the_budget_is_no_part_of_a_label(make_run):
    """Llama-large's configuration gives tokens, its twin's tokens a parameter."""
    tokens = {"schedule.tokens_per_parameter": None, "schedule.tokens": 2560, "model.size": "llama-large"}
    runs = [read_run(make_run("a", ffn="swiglu")), read_run(make_run("b", ffn="swiglu", changes=tokens))]
    assert [own.label for own in compare(runs).contenders] == ["SwiGLU, dense-0.12b", "SwiGLU, llama-large"]


def test_another_dictionary_is_no_control_of_parameters(make_run):
    runs = [
        read_run(make_run(name, ffn="bimoa", changes={"model.args": args}, parameters={"total": count}))
        for name, args, count in (("a", {}, 1000), ("b", {"ffn_gate_activations": "s,r2"}, 990))
    ]
    assert not any(row["is_control"] for row in parameter_rows(compare(runs)))


def test_parameters_alone_stand_beside_the_mixture(make_run):
    counts = {
        ("dense-0.12b", "swiglu"): 1_000_000,
        ("llama-large", "swiglu"): 1_000_500,
        ("dense-0.12b", "bimoa"): 1_000_480,
    }
    runs = [
        read_run(make_run(f"{size}{ffn}", ffn=ffn, changes={"model.size": size}, parameters={"total": count}))
        for (size, ffn), count in counts.items()
    ]
    comparison = compare(runs)
    rows = parameter_rows(comparison)
    assert [row["contender"] for row in rows] == ["SwiGLU, dense-0.12b", "SwiGLU, llama-large", "bi-MoA"]
    assert [row["is_control"] for row in rows] == [False, True, False]
    assert [row["parameters_ratio"] for row in rows] == pytest.approx([1, 1.0005, 1.00048])
    assert [row["difference"] for row in rows[1:]] == [row["loss_difference"] for row in loss_rows(comparison)[1:]]
    chart = against_parameters(comparison)
    drawn = [row for values in chart.spec["datasets"].values() for row in values if "added" in row]
    assert [(row["ffn"], row["added"]) for row in drawn] == [
        (row["contender"], pytest.approx(row["parameters_ratio"] - 1)) for row in rows
    ]
    assert [row["difference"] for row in drawn] == pytest.approx(
        [0, *(row["difference"] for row in rows[1:])], rel=1e-4
    )
    assert compare(runs, baseline="swiglu").contenders[0].label == "SwiGLU, dense-0.12b"
    alone = compare([runs[0], runs[2]])
    assert parameter_rows(alone) == [] and against_parameters(alone) is None


def test_a_run_begun_with_a_checkpoint_is_one_arm_whatever_the_seed_it_came_from(make_run):
    runs = [
        read_run(
            make_run(f"{ffn}{seed}", ffn=ffn, seed=seed, changes={"start_from": f"runs/{ffn}{seed}/checkpoints/x"})
        )
        for ffn in ("swiglu", "qdmoa")
        for seed in (0, 1)
    ]
    assert [arm.runs for arm in compare(runs).arms] == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("key", "pair", "expected"),
    [
        ("model.size", ["dense-0.12b", "llama-large"], "FFN"),
        ("model.args.intermediate_size", [64, 96], "FFN"),
        ("model.args.expert_mixing", ["layer", "expert"], "FFN"),
        ("model.args.num_hidden_layers", [2, 4], "size"),
        ("model.args.num_experts", [8, 32], "size"),
        ("model.args.vocab_size", [256, 512], "must match"),
        ("model.gradient_checkpointing", [True, False], "bookkeeping"),
        ("data.document_mask", [True, False], "must match"),
        ("data.sequence_length", [256, 512], "must match"),
        ("schedule.tokens", [1000, 2000], "must match"),
        ("schedule.tokens_per_parameter", [20, 100], "must match"),
        ("schedule.decay_fraction", [0.2, 1.0], "setting"),
        ("schedule.decay_type", ["linear", "cosine"], "setting"),
        ("schedule.warmup_steps", [100, 200], "setting"),
        ("optim.algorithm", ["adamw", "muon"], "setting"),
        ("optim.muon_scale", ["original", "match_rms_adamw"], "setting"),
        ("checkpoint.keep_interval", [None, 1000], "bookkeeping"),
        ("start_from", [None, "runs/a/checkpoints/step_1"], "setting"),
        ("start_from", ["runs/b/checkpoints/step_1", "runs/a/checkpoints/step_1"], "identity"),
    ],
)
def test_what_a_differing_key_of_language_models_means(key, pair, expected):
    assert role(key, pair) == expected
