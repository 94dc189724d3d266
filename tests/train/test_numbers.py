"""Losses that are not finite, or stand out: what is done, what is noted, and that a resumed run does the same."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train import checkpoint
from moa_train.signals import EXIT_STOPPED
from moa_train.spikes import DEVIATIONS, MEMORY, RecentLoss
from moa_train.trainer import Trainer


def events(runs, name, kind=None):
    rows = [json.loads(line) for line in (runs.out / name / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def test_the_samples_of_a_step_that_is_not_finite_are_noted(runs, capsys):
    assert runs("run", model__nan_at=7) == 1
    error = capsys.readouterr().err
    assert "events.jsonl lists its samples" in error and "--loop.max_nonfinite_steps 1" in error
    assert [row["kind"] for row in events(runs, "run")] == ["begun", "nonfinite", "failed"]
    (row,) = events(runs, "run", "nonfinite")
    assert (row["step"], row["loss"], row["grad_norm"], row["skipped"]) == (8, None, None, False)
    parts = [(part["rank"], part["loss"], part["samples"]) for part in row["micro_batches"]]
    # step 8 is the third of epoch 1: rows 16 to 23, two micro-batches of four
    assert parts == [(0, None, [f"1/{p}" for p in range(16, 20)]), (0, None, [f"1/{p}" for p in range(20, 24)])]


def grows_beyond_numbers(runs, monkeypatch, step):
    """Have a weight become infinite in the update of a step, though its loss and gradient are finite."""
    update = Trainer._update

    def overflowing(trainer, *args):
        update(trainer, *args)
        if trainer.state.step == step:
            with torch.no_grad():
                trainer.bare[0].weight[0, 0] = math.inf

    monkeypatch.setattr(Trainer, "_update", overflowing)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "newest"), [(8, "step_00000007"), (10, "step_00000007"), (2, None)])
def test_weights_that_are_not_finite_are_never_saved(runs, monkeypatch, capsys, step, newest):
    """Neither with a checkpoint that is due nor with a step that is left out: those before would be dropped."""
    grows_beyond_numbers(runs, monkeypatch, step)
    assert runs("run", loop__max_nonfinite_steps=9) == 1
    error = capsys.readouterr().err
    assert f"the weights are not finite after step {step}" in error and "--resume force --optim.lr 0.005" in error
    saved = sorted(path.name for path in (runs.out / "run" / "checkpoints").glob("step_*"))
    assert (saved[-1] if saved else None) == newest
    assert [row["kind"] for row in events(runs, "run")][-2:] == ["nonfinite_weights", "failed"]
    monkeypatch.undo()
    assert runs("run") == 0 and runs("unbroken") == 0
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")


def test_without_a_usable_held_out_sample_the_run_goes_on(runs, monkeypatch, capsys):
    monkeypatch.setattr(runs.toy.ToyTask, "val_batches", lambda task, share: [])
    assert runs("run") == 0
    assert "no held-out sample could be used" in capsys.readouterr().out
    assert runs.rows("run", "val") == [] and runs.json("run", "summary.json")["final"] is None


GRADIENTS = pytest.mark.parametrize("nan_in", ["gradient", "infinite gradient"])


def assert_only_the_gradient_was_not(runs, name, skipped):
    (row,) = events(runs, name, "nonfinite")
    assert (row["step"], row["grad_norm"], row["skipped"]) == (8, None, skipped)
    losses = [part["loss"] for part in row["micro_batches"]]
    assert len(losses) == 2 and row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6), "finite"


@GRADIENTS
def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(runs, nan_in, capsys):
    assert runs("run", model__nan_at=7, model__nan_in=nan_in) == 1
    told = "nan" if nan_in == "gradient" else "inf"
    assert f" and the gradient norm {told}, at lr" in capsys.readouterr().err
    assert_only_the_gradient_was_not(runs, "run", skipped=False)
    row = runs.rows("run", "train")[-1]
    assert row["step"] == 8 and row["grad_norm"] is None and row["loss"] == events(runs, "run", "nonfinite")[0]["loss"]
    assert (runs.out / "run/checkpoints/LAST").read_text() == "step_00000007\n"
    assert runs("run") == runs("unbroken") == 0, "the cause has gone"
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")


@GRADIENTS
def test_a_step_is_left_out_for_its_gradient_as_for_its_loss(runs, nan_in, capsys):
    assert runs("gradient", model__nan_at=7, model__nan_in=nan_in, loop__max_nonfinite_steps=1) == 0
    assert "left out, 1 of 1" in capsys.readouterr().out
    assert_only_the_gradient_was_not(runs, "gradient", skipped=True)
    assert runs("loss", model__nan_at=7, loop__max_nonfinite_steps=1) == 0
    runs.assert_same("gradient", "loss")


def test_a_step_is_left_out_for_its_loss_alone(runs):
    assert runs("alone", model__nan_at=7, model__nan_in="loss alone", loop__max_nonfinite_steps=1) == 0
    (row,) = events(runs, "alone", "nonfinite")
    assert row["loss"] is None and 0 < row["grad_norm"] < math.inf
    assert runs("both", model__nan_at=7, loop__max_nonfinite_steps=1) == 0
    runs.assert_same("alone", "both")


def test_skipping_leaves_the_step_out_and_nothing_else(runs, capsys):
    """A step whose loss is NaN, left out, equals a step that never updates: rate, order and generators go on."""
    assert runs("run", model__nan_at=7, loop__max_nonfinite_steps=1) == 0
    assert "left out, 1 of 1" in capsys.readouterr().out
    assert [row["step"] for row in runs.rows("run", "train")] == [s for s in range(1, 16) if s != 8]
    assert runs.json("run", "summary.json")["skipped_steps"] == 1
    assert runs("whole") == 0
    rows, whole = runs.rows("run", "train"), runs.rows("whole", "train")
    assert rows[:7] == whole[:7]
    assert rows[7]["loss"] != whole[8]["loss"] and [row["lr"] for row in rows[7:]] == [row["lr"] for row in whole[8:]]
    assert all(math.isfinite(row["loss"]) for row in rows)
    moments = {key: value for key, value in runs.final("run").items() if key[1].endswith(".step")}
    assert len(moments) == 4 and set(moments.values()) == {b"\x00\x00\x60\x41"}, "14 updates as float32"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [7, 8], ids=["as it is skipped", "after it"])
def test_skipping_resumes_exactly(runs, stop_at):
    assert runs("unbroken", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=2) == 0
    assert (
        runs("run", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=2, model__stop_at=stop_at)
        == EXIT_STOPPED
    )
    assert runs("run", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=2) == 0
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")
    assert runs.json("run", "summary.json")["skipped_steps"] == 2


def test_a_state_that_could_not_be_saved_is_not_called_saved(runs, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise checkpoint.NotSaved("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    assert runs("run", model__nan_at=7) == 1
    assert "the state before this step could NOT be saved" in capsys.readouterr().err


def test_one_more_than_allowed_stops_and_may_be_allowed_later(runs, capsys):
    assert runs("run", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=1) == 1
    error = capsys.readouterr().err
    assert "step 9: the loss is nan" in error and "--loop.max_nonfinite_steps 2" in error
    assert (runs.out / "run" / "checkpoints" / "LAST").read_text() == "step_00000008\n"
    assert runs("run", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=2) == 0, "a mutable_keys key"
    assert runs("unbroken", model__nan_at=7, model__nan_for=2, loop__max_nonfinite_steps=2) == 0
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")


@pytest.mark.slow
def test_spikes_of_a_run_are_noted_once_however_often_it_stops(runs, capsys):
    long = {"schedule__epochs": 16, "schedule__warmup_epochs": 1, "loop__val_every": 80, "model__high_at": 70}
    assert runs("unbroken", **long) == 0
    assert "step 71: the loss" in capsys.readouterr().out
    (spike,) = (row for row in events(runs, "unbroken", "spike") if row["step"] == 71)
    assert spike["loss"] > 5 * spike["recent_loss"] and spike["deviations"] > DEVIATIONS
    assert runs("run", **long, model__stop_at=60) == EXIT_STOPPED
    assert runs("run", **long, model__stop_at=70) == EXIT_STOPPED
    assert runs("run", **long) == 0
    noted = [[(row["step"], row["deviations"]) for row in events(runs, name, "spike")] for name in ("run", "unbroken")]
    assert noted[0] == noted[1]
    spikes = [runs.json(name, "summary.json")["loss_spikes"] for name in ("run", "unbroken")]
    assert spikes == [len(noted[0])] * 2


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=MEMORY + 1, max_size=4 * MEMORY), st.floats(20, 1e6))
def test_what_stands_out_is_a_spike_and_does_not_hide_the_next(losses, high):
    recent = RecentLoss()
    for loss in losses[:MEMORY]:
        assert recent.take(loss) is None, "too early to tell"
    assert recent.mean == pytest.approx(statistics.fmean(losses[:MEMORY]), rel=1e-9), "as long as all count alike"
    for loss in losses[MEMORY:]:
        recent.take(loss)
    mean, deviation = recent.mean, math.sqrt(recent.variance)
    for _ in range(2):
        above = recent.take(high)
        assert above is not None and above > DEVIATIONS
    assert recent.mean <= mean + 2 * (DEVIATIONS * max(2 * deviation, 1e-2 * mean)) and recent.take(mean) is None


def test_a_constant_loss_with_noise_of_its_last_digits_has_no_spikes():
    recent = RecentLoss()
    assert not any(recent.take(1.0 + 1e-5 * (step % 7 == 0)) for step in range(5 * MEMORY))


def test_a_loss_that_was_zero_may_rise():
    recent = RecentLoss()
    for _ in range(MEMORY):
        recent.take(0.0)
    assert recent.take(1.0) is not None


def test_variance_is_numpys_with_the_same_weights():
    import numpy as np

    losses = np.random.default_rng(0).normal(3.0, 0.1, 400)
    recent = RecentLoss()
    for loss in losses:
        recent.take(float(loss))
    weights = np.cumprod(np.r_[1.0, np.full(399, 1 - 1 / MEMORY)])[::-1]
    mean = np.average(losses, weights=weights)
    assert recent.mean == pytest.approx(mean, rel=1e-3)
    assert math.sqrt(recent.variance) == pytest.approx(math.sqrt(np.cov(losses, aweights=weights, bias=True)), rel=0.05)
