"""kill -9 at any moment: visible checkpoints are complete, and the resumed run equals an unbroken one."""

import multiprocessing
import random
import runpy
import signal
import sys
import time

import pytest

from moa_train import checkpoint

FORKSERVER = multiprocessing.get_context("forkserver")  # its processes have torch imported
FORKSERVER.set_forkserver_preload(["moa_train.trainer"])

INTERVAL = 5

MOMENTS = {
    "in a step": ("toy:ToyTask.loss", 17),
    "in validation": ("toy:ToyTask.val_losses", 9),
    "writing weights": ("checkpoint:save_file", 4),
    "writing the state": ("checkpoint:write_json", 2),
    "syncing a checkpoint": ("atomic_io:sync_file", 7),
    "writing LAST": ("checkpoint:write_text", 2),
    "deleting an old checkpoint": ("checkpoint:remove_leftovers", 4),
    "appending a row": ("run_folder:RunFolder.append", 9),
    "exporting": ("toy:ToyTask.export", 1),
    "writing the summary": ("run_folder:RunFolder.summarize", 1),
}


@pytest.fixture(scope="module")
def unbroken_folder(make_runs, tmp_path_factory):
    runs = make_runs(tmp_path_factory.mktemp("runs"))
    assert runs("unbroken") == 0
    return runs.out / "unbroken"


@pytest.fixture
def unbroken(runs, unbroken_folder):
    """Return the name of an unbroken run among `runs`."""
    (runs.out / "unbroken").symlink_to(unbroken_folder)
    return "unbroken"


@pytest.fixture
def start(runs, monkeypatch):
    """Return a function that starts a run in another process."""

    def begin(name, **changed):
        monkeypatch.setattr(sys, "argv", [str(runs.script), *runs.arguments(name, **changed)])
        process = FORKSERVER.Process(target=runpy.run_path, args=(str(runs.script),), kwargs={"run_name": "__main__"})
        process.start()
        return process

    return begin


def last_step(runs, name):
    """Return the last step with a complete row."""
    metrics = runs.out / name / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return len([line for line in lines if '"kind": "train"' in line])


def count_sessions(runs, name):
    """Return the number of sessions that have begun training."""
    events = runs.out / name / "events.jsonl"
    return events.read_text().count('"begun"') if events.exists() else 0


def wait_for(condition, process):
    deadline = time.monotonic() + 600
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def newest_step(folder):
    """Return the step of the newest checkpoint; all visible ones are complete."""
    newest, damaged = checkpoint.newest_valid(folder / "checkpoints")
    assert damaged == []
    return 0 if newest is None else checkpoint.read_state(newest)["step"]


FAST = ("in a step", "writing weights", "exporting")


@pytest.mark.parametrize(
    "moment", [moment if moment in FAST else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS]
)
def test_kill_at_a_moment(runs, unbroken, start, moment):
    place, call = MOMENTS[moment]
    process = start("run", model__kill_in=place, model__kill_call=call)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    newest_step(runs.out / "run")
    assert runs("run") == 0
    runs.assert_same("run", unbroken)
    assert not list((runs.out / "run").rglob(".step_*"))


@pytest.mark.parametrize(("kills", "epochs"), [(3, 12), pytest.param(36, 60, marks=pytest.mark.slow)])
def test_kills_at_random_moments(runs, start, kills, epochs):
    """Kills hit start-up, the same step twice, and ends of epochs (every fifth step)."""
    draw, newest, in_steps = random.Random(kills), 0, 0
    for _ in range(kills):
        sessions, before = count_sessions(runs, "run"), newest
        process = start("run", model__step_s=0.02, schedule__epochs=epochs)
        if draw.random() < 0.8:
            # The session has then dropped the rows after its checkpoint.
            wait_for(lambda sessions=sessions: count_sessions(runs, "run") > sessions, process)
            aim = before + draw.randrange(1, INTERVAL + 3)
            wait_for(lambda aim=aim: last_step(runs, "run") >= aim, process)
        time.sleep(draw.random() * 0.08)
        assert process.is_alive(), "the run is long enough"
        process.kill()
        process.join()
        seen, newest = last_step(runs, "run"), newest_step(runs.out / "run")
        assert newest >= before, "no checkpoint is lost"
        assert seen - newest < 2 * INTERVAL
        in_steps += count_sessions(runs, "run") > sessions and seen > before
    assert in_steps >= 2 * kills // 3
    for name in ("run", "unbroken"):
        assert runs(name, schedule__epochs=epochs) == 0
    runs.assert_same("run", "unbroken")
