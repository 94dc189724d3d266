"""Stop signals in real processes: the run saves within the step, exits with 75, and the same command continues it."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moa_train.signals import EXIT_STOPPED, StopRequests


@pytest.mark.parametrize(
    ("trouble", "steps", "changed"),
    [
        pytest.param("SIGUSR1 in validation", {4}, {}, marks=pytest.mark.slow),
        ("SIGUSR1 in a checkpoint", range(5, 15), {}),
        pytest.param("SIGUSR1 in compile", {1}, {"loop__compile": True}, marks=pytest.mark.slow),
    ],
    ids=["validation", "checkpoint", "compile"],
)
def test_signal_saves_within_the_step(runs, ranks, trouble, steps, changed):
    assert ranks(trouble, count=1, **changed) == [EXIT_STOPPED]
    summary = runs.json("run", "summary.json")
    assert summary["status"] == "stopped" and summary["steps"] in steps
    assert (runs.out / "run/checkpoints/LAST").read_text() == f"step_{summary['steps']:08}\n"
    assert ranks(count=1, **changed) == [0]
    assert "Traceback" not in ranks.stderr
    if "loop__compile" not in changed:  # two compilations round differently
        assert runs("unbroken", **changed) == 0
        runs.assert_same("run", "unbroken")


def test_signal_to_one_rank_stops_all(runs, ranks):
    assert ranks("SIGTERM", 1) == [EXIT_STOPPED, EXIT_STOPPED]
    assert ranks.stderr == ""
    assert runs.json("run", "summary.json")["status"] == "stopped"
    assert (runs.out / "run/checkpoints/LAST").read_text() == "step_00000004\n"
    assert ranks() == [0, 0]
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))
    assert runs.json("run", "summary.json")["status"] == "finished"


def test_signal_before_training_exits_at_once(runs, ranks):
    assert ranks("SIGUSR1 in build", count=1) == [EXIT_STOPPED]
    assert "SIGUSR1 before training" in (runs.out / "run.out").read_text() and ranks.stderr == ""
    assert runs("run") == 0


@pytest.mark.slow
def test_run_stops_when_its_launcher_is_killed(runs, ranks):
    assert ranks("launcher killed", count=1, model__step_s=0.2) == [-signal.SIGKILL]
    with contextlib.suppress(psutil.NoSuchProcess):
        run = psutil.Process(int((runs.out / "run.out.pid").read_text()))
        deadline = time.monotonic() + 600
        while run.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    summary = runs.json("run", "summary.json")
    assert summary["status"] == "stopped" and 4 <= summary["steps"] < 15
    assert runs("run") == 0


def test_second_ctrl_c_interrupts(monkeypatch):
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a launcher's repetition
        assert stop.received == "SIGINT"
        monkeypatch.setattr("moa_train.signals.REPEAT_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


ACCELERATE = (
    "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --main_process_port=0 "
    "--mixed_precision=no --dynamo_backend=no"
)
ALONE = ACCELERATE.replace("--multi_gpu --num_processes=2", "--num_processes=1")
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node=2"
TORCHRUN_USR1 = f"{TORCHRUN} --signals-to-handle=SIGTERM,SIGINT,SIGUSR1"  # as scripts/cluster/torchrun.sh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        (ALONE, signal.SIGTERM, -signal.SIGTERM),
        (ACCELERATE, signal.SIGTERM, 1),
        (TORCHRUN, signal.SIGTERM, 1),
        (TORCHRUN_USR1, signal.SIGUSR1, 1),
    ],
    ids=["accelerate-1-term", "accelerate-2-term", "torchrun-term", "torchrun.sh-usr1"],
)
def test_signal_to_a_launcher_stops_the_run(runs, module, number, code):
    """The launcher exits with its own code; the run saves, and its summary contains the status."""
    arguments = runs.arguments("run", schedule__epochs=20, model__step_s=0.3)
    process = subprocess.Popen(
        [sys.executable, "-m", *module.split(), str(runs.script), *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = runs.out / "run/metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or '"step": 2' not in metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=240)  # ends when all processes have closed the pipes
    assert process.returncode == code, stderr
    assert "the same command continues" in stdout
    assert runs.json("run", "summary.json")["status"] == "stopped"
