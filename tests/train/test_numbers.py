"""Non-finite losses, gradients and weights: their handling, records and exact resume."""

import json
import math

import numpy as np
import pytest
import torch

from moa_train.signals import EXIT_STOPPED
from moa_train.trainer import Trainer

FAULTY = {"model__nan_at": 7, "loop__max_nonfinite_steps": 1}


def events(runs, name, kind=None):
    rows = [json.loads(line) for line in (runs.out / name / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


@pytest.mark.parametrize("nan_in", ["loss", "gradient"])
def test_nonfinite_step_ends_the_run_before_the_update(runs, nan_in, capsys):
    assert runs("run", model__nan_at=7, model__nan_in=nan_in) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 8: the loss is ") and error.count("\n") == 1
    assert "--loop.max_nonfinite_steps 1" in error
    (event,) = events(runs, "run", "nonfinite")
    # Step 8 is the third of epoch 1: rows 16 to 23 in two micro-batches.
    assert [part["samples"] for part in event["micro_batches"]] == [
        [f"1/{p}" for p in range(16, 20)],
        [f"1/{p}" for p in range(20, 24)],
    ]
    assert event["grad_norm"] is None and (event["loss"] is None) is (nan_in == "loss")
    assert (runs.out / "run/checkpoints/LAST").read_text() == "step_00000007\n"
    assert runs.rows("run", "train")[-1]["grad_norm"] is None
    assert runs.json("run", "summary.json")["status"] == "failed"
    assert runs("run") == runs("unbroken") == 0, "the cause has gone"
    assert (runs.rows("run"), runs.final("run")) == (runs.rows("unbroken"), runs.final("unbroken"))


def test_skipped_step_changes_no_weight(runs, capsys):
    assert runs("run", **FAULTY) == 0
    assert "step skipped, 1 of 1" in capsys.readouterr().out
    assert [row["step"] for row in runs.rows("run", "train")] == [s for s in range(1, 16) if s != 8]
    assert runs.json("run", "summary.json")["skipped_steps"] == 1
    assert runs("whole") == 0
    rows, whole = runs.rows("run", "train"), runs.rows("whole", "train")
    assert rows[:7] == whole[:7]
    assert rows[7]["loss"] != whole[8]["loss"] and [row["lr"] for row in rows[7:]] == [row["lr"] for row in whole[8:]]
    moments = {key: value for key, value in runs.final("run").items() if key[1].endswith(".step")}
    assert len(moments) == 4 and set(moments.values()) == {np.float32(14).tobytes()}


@pytest.mark.slow
def test_resume_with_skipped_steps_is_exact(runs):
    faulty = {"model__nan_at": 7, "model__nan_for": 2, "loop__max_nonfinite_steps": 2}
    assert runs("unbroken", **faulty) == 0
    assert runs("run", **faulty, model__stop_at=7) == EXIT_STOPPED
    assert runs("run", **faulty) == 0
    runs.assert_same("run", "unbroken")


def test_limit_of_skipped_steps_can_be_raised(runs, capsys):
    assert runs("run", **FAULTY, model__nan_for=2) == 1
    error = capsys.readouterr().err
    assert "step 9: the loss is nan" in error and "--loop.max_nonfinite_steps 2" in error
    raised = {"model__nan_at": 7, "model__nan_for": 2, "loop__max_nonfinite_steps": 2}
    assert runs("run", **raised) == runs("unbroken", **raised) == 0
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "newest"), [(8, "step_00000005"), (2, None)])
def test_nonfinite_weights_are_never_saved(runs, monkeypatch, capsys, step, newest):
    train_step = Trainer.train_step

    def overflowing(trainer, batches):
        train_step(trainer, batches)
        if trainer.state.step == step:
            with torch.no_grad():
                trainer.bare[0].weight[0, 0] = math.inf

    monkeypatch.setattr(Trainer, "train_step", overflowing)
    assert runs("run", loop__max_nonfinite_steps=9) == 1
    assert f"the weights are not finite after step {step}" in capsys.readouterr().err
    saved = sorted(path.name for path in (runs.out / "run" / "checkpoints").glob("step_*"))
    assert (saved[-1] if saved else None) == newest
    assert [row["kind"] for row in events(runs, "run")][-2:] == ["nonfinite_weights", "failed"]
    monkeypatch.undo()
    assert runs("run") == runs("unbroken") == 0
    assert runs.rows("run") == runs.rows("unbroken") and runs.final("run") == runs.final("unbroken")
