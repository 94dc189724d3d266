"""SIGTERM and SIGUSR1, wherever they come: the run saves within the step and ends with 75; the same command goes on.

What a signal in a step or in validation does on one process, for every kind of step, is in test_resume.py.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from queue import Queue

import psutil
import pytest

from moa_train.signals import EXIT_STOPPED, LAUNCHED, StopRequests


def same(runs, name, other):
    assert runs.rows(name) == runs.rows(other)
    assert runs.final(name) == runs.final(other)


@pytest.mark.parametrize(
    ("trouble", "steps", "changed"),
    [
        pytest.param("SIGUSR1", {4}, {"schedule__warmup_epochs": 2}, marks=pytest.mark.slow),
        pytest.param("SIGUSR1 in validation", {4}, {}, marks=pytest.mark.slow),
        ("SIGUSR1 in a checkpoint", range(3, 15), {}),  # that of step 2, which is written while others are taken
        pytest.param("SIGUSR1 in compile", {1}, {"loop__compile": True}, marks=pytest.mark.slow),
    ],
    ids=["warm-up", "validation", "checkpoint", "compile"],
)
def test_slurms_warning(runs, ranks, trouble, steps, changed):
    """At most the step at hand is finished; then nothing is missing and nothing comes twice."""
    assert ranks(trouble, count=1, **changed) == [EXIT_STOPPED]
    summary = runs.json("run", "summary.json")
    assert summary["status"] == "stopped" and summary["steps"] in steps
    assert (runs.out / "run/checkpoints/LAST").read_text() == f"step_{summary['steps']:08}\n"
    assert ranks(count=1, **changed) == [0]
    assert "Traceback" not in ranks.said
    if "loop__compile" not in changed:  # compiled twice is rounded twice
        assert runs("unbroken", **changed) == 0
        same(runs, "run", "unbroken")


@pytest.mark.parametrize(
    ("trouble", "on"),
    [("SIGTERM", 1), pytest.param("SIGUSR1 in validation", 0, marks=pytest.mark.slow)],
    ids=["step", "validation"],
)
def test_a_signal_to_one_of_two_stops_both(runs, ranks, trouble, on):
    assert ranks(trouble, on) == [EXIT_STOPPED, EXIT_STOPPED]
    assert ranks.said == "", "to stop is no failure"
    assert runs.json("run", "summary.json")["status"] == "stopped"
    assert (runs.out / "run/checkpoints/LAST").read_text() == "step_00000004\n"
    assert ranks() == [0, 0]
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))
    assert runs.json("run", "summary.json")["status"] == "finished"


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_stops(runs, ranks):
    """SIGTERM kills accelerate's launcher of one process, which passes nothing on."""
    assert ranks("launcher killed", count=1, model__step_s=0.2) == [-signal.SIGKILL]
    gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    with contextlib.suppress(psutil.NoSuchProcess):
        run = psutil.Process(int((runs.out / "run.out.pid").read_text()))
        deadline = time.monotonic() + 600
        while run.status() not in gone:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    summary = runs.json("run", "summary.json")
    assert summary["status"] == "stopped" and 4 <= summary["steps"] < 15
    assert (runs.out / "run/checkpoints/LAST").read_text() == f"step_{summary['steps']:08}\n"
    assert runs("run") == 0, "nobody holds the folder"


def stop_while_parents_are(parents, expected, monkeypatch):
    """What is received by a process whose parents these are, one after the other."""
    monkeypatch.setattr("moa_train.signals.LAUNCHER_S", 0.01)
    parents = iter(parents)
    last = None

    def parent():
        nonlocal last
        last = next(parents, last)
        return last

    monkeypatch.setattr(os, "getppid", parent)
    with StopRequests() as stop:
        deadline = time.monotonic() + (600 if expected else 0.3)
        while not stop.received and time.monotonic() < deadline:
            time.sleep(0.01)
    return stop.received


@pytest.mark.parametrize("launched", [True, False])
def test_only_a_launcher_is_watched(launched, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    expected = "SIGTERM" if launched else ""
    assert stop_while_parents_are([7, 7, 8], expected, monkeypatch) == expected


@pytest.mark.parametrize(
    ("parent", "program", "gone"),
    [
        (1, "/sbin/init\0splash", True),
        (1, "bash", True),
        (1, None, True),
        (1, "/opt/venv/bin/python3.12\0/opt/venv/bin/torchrun", False),
        (7, "/usr/lib/systemd/systemd\0--user", True),
        (7, "slurmstepd: [41.0]", False),
        (7, "my_launcher", False),
        (7, None, False),
    ],
)
def test_a_launcher_that_ended_during_the_imports_is_missed(parent, program, gone, monkeypatch, tmp_path):
    """Unless the parent may be a launcher: a container's first process, Slurm's, somebody's own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("moa_train.signals.PROC", tmp_path)
    if program is not None:
        (tmp_path / f"{parent}").mkdir()
        (tmp_path / f"{parent}/cmdline").write_text(program + "\0")
    expected = "SIGTERM" if gone else ""
    assert stop_while_parents_are([parent], expected, monkeypatch) == expected


@pytest.mark.parametrize(
    ("count", "on"),
    [(1, 0), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
    ids=["alone", "0 of 2", "1 of 2"],
)
def test_before_training_there_is_nothing_to_wait_for(runs, ranks, count, on):
    """One that was about to look for its data for hours, and another that waits for it."""
    assert ranks("SIGUSR1 in build", on, count) == [EXIT_STOPPED] * count
    said = (runs.out / "run.out").read_text()
    assert said.count("SIGUSR1: training had not begun") == said.count("The same command continues") == 1
    assert ranks.said == ""
    assert ranks(count=count) == [0] * count


@pytest.mark.slow
def test_one_that_waits_for_others_can_be_stopped(runs, ranks):
    """In C: Python calls no handler there."""
    processes = ranks.start("SIGTERM before the other comes")
    processes[0].join(600)
    processes[1].kill()
    assert ranks.end(processes) == [EXIT_STOPPED, -signal.SIGKILL]
    assert "SIGTERM: training had not begun" in (runs.out / "run.out").read_text()
    assert ranks.said == ""


def wait_for_signal(worker):
    signal.signal(signal.SIGTERM, lambda number, frame: worker.set())
    signal.raise_signal(signal.SIGTERM)


def test_signals_of_the_block_and_before_it_and_no_others_end_at_once():
    """Nor does a signal to a worker that was forked there: only this process's own are meant."""
    ended = Queue()
    with StopRequests() as stop:
        context = multiprocessing.get_context("fork")
        with stop.at_once(ended.put):
            handled = context.Event()
            worker = context.Process(target=wait_for_signal, args=[handled])
            worker.start()
            worker.join()
            assert handled.is_set() and ended.empty()
            signal.raise_signal(signal.SIGUSR1)
            assert ended.get(timeout=600) == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)
        assert ended.empty()
        with stop.at_once(ended.put):
            assert ended.get(timeout=600) == stop.received == "SIGUSR1"


LAUNCH = "moa_train.launch --standalone --nproc-per-node=2"
ACCELERATE = (
    "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --main_process_port=0 "
    "--mixed_precision=no --dynamo_backend=no"
)
ALONE = ACCELERATE.replace("--multi_gpu --num_processes=2", "--num_processes=1")
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node=2"


def launch_and_signal(runs, module, number):
    """Send the launcher a signal after two steps; return it, and what was said until all it started had ended."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    arguments = runs.arguments("run", schedule__epochs=20, model__step_s=0.3)
    process = subprocess.Popen(
        [sys.executable, "-m", *module.split(), str(runs.script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = runs.out / "run/metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or '"step": 2' not in metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    return process, process.communicate(timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number"),
    [(ALONE, signal.SIGTERM), (ALONE, signal.SIGUSR1), (TORCHRUN, signal.SIGUSR1), (TORCHRUN, signal.SIGKILL)],
    ids=["accelerate launch, SIGTERM", "accelerate launch, SIGUSR1", "torchrun, SIGUSR1", "torchrun, SIGKILL"],
)
def test_a_signal_that_ends_the_launcher_alone(runs, module, number):
    """The run saves and ends all the same: nothing is left that could say more."""
    process, said = launch_and_signal(runs, module, number)
    assert process.returncode == -number, said
    assert "The same command continues" in said[0], said
    assert runs.json("run", "summary.json")["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number", "code"),
    [(LAUNCH, signal.SIGTERM, EXIT_STOPPED), (LAUNCH, signal.SIGUSR1, EXIT_STOPPED), (ACCELERATE, signal.SIGTERM, 1)],
    ids=["launch, SIGTERM", "launch, SIGUSR1", "accelerate launch, SIGTERM"],
)
def test_a_signal_to_the_launcher(runs, module, number, code):
    """All save; accelerate launch tells a stop from a failure by no code of its own."""
    process, said = launch_and_signal(runs, module, number)
    assert process.returncode == code, said
    assert "The same command continues" in said[0]
    assert code == 1 or "Traceback" not in said[1]
    assert runs.json("run", "summary.json")["status"] == "stopped"
