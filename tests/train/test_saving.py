"""Checkpoints are written while training continues; one process at a time holds the run folder; full disks."""

import errno
import subprocess
import sys
import threading
import time

import pytest

from moa_train import checkpoint
from moa_train.run_folder import RunFolder


@pytest.fixture
def each_step(runs, monkeypatch):
    """each_step(action) calls action(i) in the forward pass of step i, from 0."""

    def use(action):
        loss = runs.toy.ToyTask.loss

        def watched(task, model, batch):
            if batch[0] >= 0:  # no example
                action(batch[0])
            return loss(task, model, batch)

        monkeypatch.setattr(runs.toy.ToyTask, "loss", watched)

    return use


def test_training_continues_while_a_checkpoint_is_written(runs, each_step, monkeypatch):
    ahead, continued, save = threading.Event(), [], checkpoint.save

    def slow(folder, state, *args, **kwargs):
        if state["step"] == 5:
            continued.append(ahead.wait(30))
        return save(folder, state, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    each_step(lambda i: ahead.set() if i >= 6 else None)
    assert runs("run") == 0 and continued == [True]


def test_a_checkpoint_waits_for_the_one_before(runs, each_step, monkeypatch):
    """At any time less than two intervals are not saved, however slow writing is."""
    unsaved, save = [], checkpoint.save

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return save(*args, **kwargs)

    def look(i):
        newest, _ = checkpoint.newest_valid(runs.out / "run" / "checkpoints")
        unsaved.append(i + 1 - (0 if newest is None else checkpoint.read_state(newest)["step"]))

    monkeypatch.setattr(checkpoint, "save", slow)
    each_step(look)
    assert runs("run", checkpoint__keep_latest=3) == 0
    assert 5 < max(unsaved) <= 10 and len(unsaved) == 2 * 15  # micro-batches


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("process 77 on node1", file=file, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


def test_run_in_use_is_refused_before_anything_is_read(runs, capsys, monkeypatch):
    (runs.out / "run").mkdir()
    command = [sys.executable, "-I", "-c", HOLD, str(runs.out / "run/run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "newest_valid", None)
            assert runs("run") == 2
        holder.kill()
    assert "in use by another process (process 77 on node1)" in capsys.readouterr().err
    assert runs("run") == 0, "the lock ends with its process"


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_unwritable_run_folder_is_one_message(runs, when, monkeypatch, capsys):
    if when == "later":
        append, calls = RunFolder.append, []

        def stale(folder, row):
            calls.append(row)
            if len(calls) > 6:
                raise OSError(errno.ESTALE, "Stale file handle", str(folder.metrics))
            append(folder, row)

        monkeypatch.setattr(RunFolder, "append", stale)
    else:
        (runs.out / "run").write_text("in the way")
    assert runs("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "could not be written: " in error and error.count("\n") == 1


@pytest.fixture
def limited(runs, ranks):
    """limited(size, ...) runs with a kernel limit on file sizes; returns exit code and output."""

    def run(size, **changed):
        (code,) = ranks(count=1, model__max_file=size, **changed)
        return code, (runs.out / "run.out").read_text()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("size", [2_500, 8_000], ids=["rows", "checkpoints"])
def test_full_disk_is_one_message_and_keeps_the_old_checkpoint(runs, ranks, limited, size):
    """Of 400 units, checkpoints have 12 kB and all rows 3 kB."""
    wide = {"model__width": 400, "loop__val_every": 50}
    assert runs("unbroken", **wide) == 0
    assert runs("run", **wide, model__stop_at=4) == 75
    code, _ = limited(size, **wide)
    assert code == 1 and "could not be written: " in ranks.stderr and ranks.stderr.count("\n") == 1, ranks.stderr
    newest, damaged = checkpoint.newest_valid(runs.out / "run" / "checkpoints")
    assert newest.name == "step_00000005" and damaged == []
    assert not list((runs.out / "run").rglob(".*"))
    assert runs("run", **wide) == 0
    runs.assert_same("run", "unbroken")


def test_stop_that_cannot_be_saved_fails(limited, ranks):
    """Its exit code is not 75, with which a job would requeue itself again and again."""
    code, _ = limited(8_000, model__width=400, loop__val_every=50, model__stop_at=3)
    assert code == 1 and "step_00000004 could not be written" in ranks.stderr
