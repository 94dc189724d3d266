"""Checkpoints beside training: steps go on, at most save_every of them are at stake, one process has the folder."""

import errno
import platform
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from moa_train import atomic_io, checkpoint, run_folder


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


def test_steps_go_on_while_a_checkpoint_is_written(runs, each_step, monkeypatch):
    ahead, went_on, save = threading.Event(), [], checkpoint.save

    def slow(folder, state, *args, **kwargs):
        if state["step"] == 5:
            went_on.append(ahead.wait(30))
        return save(folder, state, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    each_step(lambda i: ahead.set() if i >= 6 else None)
    assert runs("run") == 0 and went_on == [True]


def test_no_crash_can_lose_more_than_save_every_steps(runs, each_step, monkeypatch):
    """Writing takes longer than the steps here: they have to wait, or each could lose up to twice as many."""
    at_stake, save = [], checkpoint.save

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return save(*args, **kwargs)

    def newest_step():
        newest, _ = checkpoint.newest_valid(runs.out / "run" / "checkpoints")
        return 0 if newest is None else checkpoint.read_state(newest)["step"]

    def look(i):
        # Twice: the newest that a first look has listed may be superseded, and gone, before it is read.
        at_stake.append(i + 1 - max(newest_step(), newest_step()))

    monkeypatch.setattr(checkpoint, "save", slow)
    each_step(look)
    assert runs("run") == 0
    assert max(at_stake) <= 5 and len(at_stake) == 2 * 15  # micro-batches


def test_a_checkpoint_without_a_note_of_it_is_one(runs, monkeypatch, capsys):
    """Only LAST, for people, cannot be written: the run finishes."""
    write = checkpoint.write_text

    def no_note(path, text):
        if path.name == "LAST" and "15" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", no_note)
    assert runs("run") == 0
    assert "step_00000015 is saved, but LAST" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_folder_that_cannot_be_written_is_told_in_one_message(runs, when, monkeypatch, capsys):
    """For another reason than a full disk; what has to be noted at the end cannot be either."""
    if when == "later":
        append, calls = atomic_io.LineFile.append, []

        def stale(lines, line):
            calls.append(line)
            if len(calls) > 6:
                raise OSError(errno.ESTALE, "Stale file handle", str(lines.path))
            append(lines, line)

        monkeypatch.setattr(atomic_io.LineFile, "append", stale)
    else:
        (runs.out / "run").write_text("in the way")
    assert runs("run") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and ("cannot be written: " if when == "later" else "cannot be written to") in said


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(sys.argv[2], 77, file=file, flush=True)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def held(runs):
    """held(holder, seconds) has another process hold the folder of "run"."""
    processes = []

    def begin(holder, seconds):
        (runs.out / "run").mkdir(exist_ok=True)
        command = [sys.executable, "-I", "-c", HOLD, str(runs.out / "run/run.lock"), holder, str(seconds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_a_run_that_is_under_way_is_refused_before_anything_is_read(runs, held, capsys, monkeypatch):
    held(platform.node(), 60)
    monkeypatch.setattr(checkpoint, "newest_valid", None)
    assert runs("run") == 2
    assert f"being run by another process (process 77 on {platform.node()})" in capsys.readouterr().err


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(runs, held, capsys, monkeypatch):
    holder = held("elsewhere", 600)

    def release(_):
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=time.monotonic, sleep=release))
    assert runs("run") == 0
    assert "waiting for elsewhere" in capsys.readouterr().err


def test_not_for_ever(runs, held, capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "LEASE_S", 0)
    held("elsewhere", 60)
    assert runs("run") == 2
    assert "process 77 on elsewhere" in capsys.readouterr().err
