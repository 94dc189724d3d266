import numpy as np
import pytest

from moa_eval.training.configuration import role
from moa_eval.training.grouping import compare
from moa_eval.training.reading import read_run
from moa_train.errors import ConfigError, DataError

MOA = "vit_tiny_patch4_qdmoa"


def sweep(make_run, finals):
    """Read runs by (FFN, learning rate, seed) with these final losses."""
    return [
        read_run(make_run(f"{ffn}_{rate}_{seed}", encoder=f"vit_tiny_patch4_{ffn}", lr=rate, seed=seed, final=final))
        for (ffn, rate, seed), final in finals.items()
    ]


def test_runs_that_differ_in_seed_and_bookkeeping_form_a_group(make_run):
    folders = [
        make_run("s0", seed=0),
        make_run("m0", seed=0, encoder=MOA),
        make_run("s1", seed=1, changes={"data.workers": 0, "loop.log_every": 5, "loop.micro_batch_size": 8}),
        make_run("m1", seed=1, encoder=MOA),
        make_run("hot", seed=0, encoder=MOA, lr=1.2e-3),
    ]
    comparison = compare([read_run(folder) for folder in folders])
    assert [(group.label, [run.name for run in group.runs]) for group in comparison.groups] == [
        ("SwiGLU", ["s0", "s1"]), ("qd-MoA, lr 3e-4", ["m0", "m1"]), ("qd-MoA, lr 1.2e-3", ["hot"]),
    ]  # fmt: skip
    assert [(run.index, run.label) for run in comparison.runs] == [
        (0, "SwiGLU, seed 0"), (1, "SwiGLU, seed 1"), (2, "qd-MoA, lr 3e-4, seed 0"),
        (3, "qd-MoA, lr 3e-4, seed 1"), (4, "qd-MoA, lr 1.2e-3"),
    ]  # fmt: skip
    assert comparison.incomparable == ()


def test_a_method_is_represented_by_the_lowest_mean(make_run):
    losses = {1e-3: (0.40, 0.56), 2e-3: (0.45, 0.47), 4e-3: (0.50, 0.51)}  # the lowest single loss is at 1e-3
    finals = {("swiglu", 1e-3, 0): 0.5, ("swiglu", 1e-3, 1): 0.5}
    finals |= {("qdmoa", rate, seed): final for rate, own in reversed(losses.items()) for seed, final in enumerate(own)}
    comparison = compare(sweep(make_run, finals))
    swiglu, moa = comparison.methods
    assert (swiglu.is_tuned, moa.is_tuned, moa.baseline) == (False, True, swiglu)
    assert [group.learning_rate for group in moa.groups] == [*losses]
    assert moa.best is moa.groups[1] and moa.shown_run is moa.best.runs[0]
    (contrast,) = comparison.contrasts("loss_norm")
    assert (contrast.group, contrast.baseline) == (moa.best, swiglu.best)
    assert contrast.interval.mean == pytest.approx(-0.04, abs=0.01)
    assert [(own.group, own.baseline) for own in comparison.equal_rates("loss_norm")] == [(moa.groups[0], swiglu.best)]


def test_a_rate_with_a_diverged_or_only_unfinished_runs_is_not_the_best(make_run):
    moa = {"encoder": MOA, "final": 0.1}
    folders = [make_run("base"), make_run("hot", **moa, lr=4e-3), make_run("nan", **moa, lr=4e-3, seed=1, nan_from=38)]
    folders.append(make_run("short", **moa, lr=1e-3, steps=30, status="stopped"))
    runs = [read_run(folder) for folder in folders]
    fine = read_run(make_run("fine", encoder=MOA, lr=5e-4, final=0.4))
    comparison = compare([*runs, fine])
    assert comparison.methods[1].best.learning_rate == 5e-4
    assert comparison.incomparable == ()  # the unfinished run is not part of the compared groups
    without = compare(runs)
    assert without.methods[1].best is None and without.contrasts("loss_norm") == []


def test_an_unfinished_seed_changes_neither_best_rate_nor_difference(make_run):
    runs = sweep(make_run, {("swiglu", 1e-3, 0): 0.5, ("qdmoa", 1e-3, 0): 0.45, ("qdmoa", 2e-3, 0): 0.4})
    before = compare(runs)
    after = compare([*runs, read_run(make_run("s", encoder=MOA, lr=2e-3, seed=1, steps=30, status=None))])
    assert [own.best.label for own in after.methods] == [own.best.label for own in before.methods]
    assert [run.name for group in after.groups for run in group.unfinished] == ["s"]
    for contrasts in ("contrasts", "equal_rates"):
        pairs = zip(getattr(after, contrasts)("loss_norm"), getattr(before, contrasts)("loss_norm"), strict=True)
        assert all((own.losses, own.seen) == (other.losses, other.seen) for own, other in pairs)
    assert after.incomparable == ()


@pytest.mark.parametrize("name", ["SwiGLU", "swiglu", "swiglu_0.002_0", ["gelu", "swiglu", "qdmoa"], "folder"])
def test_the_baseline_can_be_named(make_run, name):
    runs = sweep(make_run, {("qdmoa", 1e-3, 0): 0.5, ("swiglu", 1e-3, 0): 0.5, ("swiglu", 2e-3, 0): 0.4})
    comparison = compare(runs, baseline=str(runs[1].folder) if name == "folder" else name)
    assert [own.label for own in comparison.methods] == ["SwiGLU", "qd-MoA"]
    assert compare(runs).methods[0].label == "qd-MoA"


def test_an_unknown_baseline_is_an_error_that_lists_the_methods(make_run):
    runs = sweep(make_run, {("qdmoa", 1e-3, 0): 0.5, ("swiglu", 1e-3, 0): 0.5})
    with pytest.raises(ConfigError, match="--baseline gelu matches no single method; give one of: qd-MoA; SwiGLU"):
        compare(runs, baseline="gelu")


def test_figures_of_many_runs_show_the_best_groups(make_run):
    finals = {("swiglu", 1e-3, seed): 0.5 for seed in range(2)}
    finals |= {("qdmoa", rate, seed): 0.4 + 40 * rate for rate in (1e-3, 2e-3, 4e-3) for seed in range(2)}
    few = sweep(make_run, finals)
    assert compare(few).hidden == []
    more = compare([*few, *sweep(make_run, {("qdmoa", 8e-3, 0): 0.9})])
    assert more.hidden == [4, 5, 6, 7, 8]


def test_methods_of_one_ffn_are_labelled_by_their_settings(make_run):
    changes = [{}, {"ffn_mixing_gate": "tanh"}, {"ffn_up_activations": "id,r2"}, {"mlp_ratio": 5.0}]
    runs = [
        read_run(make_run(f"r{i}_{rate}", encoder=MOA, lr=rate, changes={"model.encoder_args": own}))
        for i, own in enumerate(changes)
        for rate in (1e-3, 2e-3)
    ]
    comparison = compare(runs)
    assert [own.label for own in comparison.methods] == [
        "qd-MoA", "qd-MoA, mixing_gate tanh", "qd-MoA, up_activations id,r2", "qd-MoA, mlp_ratio 5",
    ]  # fmt: skip
    assert {role(key, own) for key, own in comparison.differing.items()} == {"identity", "FFN", "peak rate"}
    assert comparison.runs[3].label == "qd-MoA, mixing_gate tanh, lr 2e-3"


def test_runs_of_two_kinds_or_one_run_given_twice_are_not_compared(make_run):
    language, vision = read_run(make_run("lm", ffn="swiglu")), read_run(make_run("mae"))
    with pytest.raises(DataError, match=r"lm is a language model and .*mae a masked autoencoder"):
        compare([language, vision])
    with pytest.raises(DataError, match="given 2 times"):
        compare([vision, vision])


def test_incomparable_runs_are_named_by_key_and_rejected_by_strict(make_run):
    changes = {"data.train": "other", "schedule.epochs": 20.0, "schedule.batch_size": 32, "model.mask_ratio": 0.5}
    runs = [read_run(make_run("a")), read_run(make_run("b", encoder=MOA, changes=changes))]
    assert {*compare(runs).incomparable} == {
        "data.train: shards/train (SwiGLU), other (qd-MoA)", "schedule.epochs: 10 (SwiGLU), 20 (qd-MoA)",
        "schedule.batch_size: 64 (SwiGLU), 32 (qd-MoA)", "model.mask_ratio: 0.75 (SwiGLU), 0.5 (qd-MoA)",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"not comparable: .*data\.train"):
        compare(runs, strict=True)


def test_another_number_of_images_is_not_comparable(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", encoder=MOA, steps=30, status="stopped"))]
    (reason,) = compare(runs).incomparable
    assert reason.replace("\u202f", "") == "images seen: 2560 (SwiGLU), 1920 (qd-MoA)"


def test_a_contrast_is_taken_at_the_last_common_validation(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", encoder=MOA, steps=30, status=None))]
    (contrast,) = compare(runs).contrasts("loss_norm")
    assert contrast.seen == 30 * 64
    assert contrast.interval.mean == runs[1].validation["loss_norm"][2] - runs[0].validation["loss_norm"][2]


def test_runs_of_one_seed_are_one_observation(make_run):
    runs = [
        read_run(make_run(name, encoder=f"vit_tiny_patch4_{ffn}", final=final, changes={"name": "other"}))
        for name, ffn, final in [("a", "gelu", 0.5), ("b", "moa", 0.4), ("c", "moa", 0.6)]
    ]
    (contrast,) = compare(runs).contrasts("loss_norm")
    assert contrast.losses == {0: pytest.approx(np.mean([run.validation["loss_norm"][-1] for run in runs[1:]]))}


def test_runs_started_from_checkpoints_of_their_seeds_form_a_group(make_run):
    runs = [
        read_run(
            make_run(f"{ffn}{seed}", ffn=ffn, seed=seed, changes={"start_from": f"runs/{ffn}{seed}/checkpoints/x"})
        )
        for ffn in ("swiglu", "qdmoa")
        for seed in (0, 1)
    ]
    assert [len(group.runs) for group in compare(runs).groups] == [2, 2]
