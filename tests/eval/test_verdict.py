import re

import pytest

from moa_eval.training.comparison import compare
from moa_eval.training.runs import read_run
from moa_eval.training.verdict import caveats, verdict

MOA = "vit_tiny_patch4_qdmoa"


def say(folders):
    comparison = compare([read_run(folder) for folder in folders])
    return [" ".join(part.split()) for part in verdict(comparison)], "\n".join(caveats(comparison))


def test_one_seed_is_not_evidence(make_run):
    folders = [make_run("a", final=0.5), make_run("b", encoder=MOA, final=0.4)]
    a, b = (read_run(folder).validation["loss_norm"][-1] for folder in folders)
    sentences, notes = say(folders)
    assert sentences == [
        f"qd-MoA is {a - b:.4f} ({(a - b) / a:.2%}".replace("%", " %")
        + ") below SwiGLU in validation reconstruction "
        f"loss: {b:.4f} against {a:.4f} after 2 560 images (normalized space).",
        "One seed: not evidence of a general difference.",
    ]
    assert notes == ""


def test_a_worse_ffn_is_called_above(make_run):
    sentences, _ = say([make_run("a", final=0.4), make_run("b", encoder=MOA, final=0.5)])
    assert re.match(r"qd-MoA is 0\.\d{4} \(\d\d\.\d\d %\) above SwiGLU", sentences[0])


@pytest.mark.parametrize(("gap", "words"), [(0.1, "excludes zero"), (0.0, "includes zero")])
def test_seeds_give_an_interval(make_run, gap, words):
    folders = [make_run(f"a{seed}", seed=seed, final=0.5) for seed in range(3)]
    folders += [make_run(f"b{seed}", seed=seed, encoder=MOA, final=0.5 - gap) for seed in range(3)]
    sentences, _ = say(folders)
    assert "on average" in sentences[0]
    assert sentences[1].startswith("The 95 % interval over 3 paired seeds, ")
    assert words in sentences[1]


def test_the_side_with_one_seed_is_named(make_run):
    folders = [make_run("a0"), make_run("b0", encoder=MOA, seed=0), make_run("b1", encoder=MOA, seed=1)]
    assert say(folders)[0][1] == "One seed of SwiGLU: not evidence of a general difference."


def test_the_best_of_several_is_said_to_be_picked(make_run):
    folders = [
        make_run("a"),
        make_run("b", encoder=MOA, final=0.4),
        make_run("c", encoder="vit_tiny_patch4_moa", final=0.3),
    ]
    sentences, notes = say(folders)
    assert sentences[0].startswith("MoA is ")
    assert "the best of 2 alternatives" in notes


def test_incomparable_runs_are_no_evidence(make_run):
    sentences, _ = say([make_run("a"), make_run("b", encoder=MOA, changes={"data.train": "other"})])
    assert sentences[1] == "The runs are not comparable as they stand: this is no evidence about the FFN."


def test_a_diverged_run_is_left_out_and_named(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA, nan_from=25)]
    sentences, notes = say(folders)
    assert sentences == [
        "No other FFN shares a validation of finite loss with SwiGLU: there is no difference to report."
    ]
    assert "qd-MoA diverged: its loss or gradient is not finite at step 25; the verdict leaves it out." in notes


def test_one_run_stands_alone(make_run):
    folder = make_run("a")
    loss = read_run(folder).validation["loss_norm"][-1]
    assert say([folder])[0] == [
        f"SwiGLU has a validation reconstruction loss of {loss:.4f} (normalized space); "
        "there is nothing to compare it with."
    ]


def test_a_run_without_validation_has_nothing_to_say(make_run):
    sentences, notes = say([make_run("a", steps=5, status=None)])
    assert sentences == ["SwiGLU has no validation of finite loss, and there is nothing to compare it with."]
    assert notes == "SwiGLU is unfinished: it has seen 320 images."


def test_what_else_differs_is_said(make_run):
    changes = {"optim.weight_decay": 0.1, "model.encoder_args": {"embed_dim": 96, "depth": 2}}
    folders = [make_run("a"), make_run("b", encoder=MOA, lr=1.2e-3, seed=1, mixing=50_000, changes=changes)]
    notes = say(folders)[1]
    assert "Peak learning rates differ: 3e-4 (SwiGLU), 1.2e-3 (qd-MoA)." in notes
    assert "(optim.weight_decay and model.encoder_args.embed_dim)" in notes
    assert "Seeds differ: 0 (SwiGLU), 1 (qd-MoA)." in notes
    assert "qd-MoA has 1.05× the parameters of SwiGLU." in notes


def test_the_verdict_follows_the_training_objective_and_names_a_contradiction(make_run):
    pixel = {"model.norm_pix_loss": False}
    folders = [make_run("a", changes=pixel), make_run("b", encoder=MOA, final=0.4, changes=pixel)]
    for folder in folders[1:]:  # better in pixel space, worse in normalized space
        path = folder / "metrics.jsonl"
        path.write_text(re.sub(r'"loss_norm": [0-9.]+', '"loss_norm": 0.9', path.read_text()))
    sentences, notes = say(folders)
    assert "below SwiGLU" in sentences[0]
    assert "(pixel space)" in sentences[0]
    assert "In normalized space qd-MoA has the other sign: +" in notes


def test_a_summary_that_contradicts_the_rows_is_named(make_run):
    folder = make_run("a")
    path = folder / "summary.json"
    path.write_text(re.sub(r'"loss_norm": [0-9.]+', '"loss_norm": 0.1234', path.read_text()))
    assert "summary.json has another final loss than metrics.jsonl" in say([folder])[1]
