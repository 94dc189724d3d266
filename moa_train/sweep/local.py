"""The runs of a sweep on this machine, some at a time, each a process with its log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from moa_train.signals import EXIT_STOPPED, StopRequests
from moa_train.sweep.board import Board
from moa_train.sweep.grid import PlannedRun
from moa_train.sweep.state import DONE, Job

Running = tuple[Job, "subprocess.Popen[bytes]"]

OPEN = ("waiting", "elsewhere")
"""States of runs that are still to be started, or waited for."""

POLL_S = 0.2
"""Seconds between looks at the processes."""

TAIL_LINES = 15
"""Lines of a failed run's log that are shown."""


def run_all(
    jobs: Sequence[Job],
    command: Sequence[str],
    board: Board,
    *,
    at_once: int,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Run what is not done, `at_once` at a time; return the stop signal that ended it early, or "".

    A run that fails is shown with the end of its log, and the rest goes on. A stop signal (Ctrl-C, SIGTERM, SIGUSR1)
    is passed on as SIGTERM, and the runs are waited for while they save; Ctrl-C again some seconds later kills them.

    Args:
        jobs: All runs of the sweep; their `state` and `progress` are kept up to date.
        command: What stands before each run's arguments.
        board: Shows how they do.
        at_once: How many run at a time.
        environment: Environment variables of the runs.
    """
    slots = [{**with_own_programs(environment), **own} for own in slot_environments(at_once, environment)]
    running: dict[int, Running] = {}
    passed_on = False
    with StopRequests() as stop, _killed_on_the_way_out(running):
        while True:
            _collect(running, board, stopping=passed_on)
            if stop.received and not passed_on:
                passed_on = True
                board.say(f"{stop.received}: waiting for {len(running)} run(s) to save")
                _signal_all(running, signal.SIGTERM)
            if not stop.received:
                _fill(running, slots, jobs, command, board)
            if not running and (stop.received or not any(job.state in OPEN for job in jobs)):
                return stop.received
            if board.due():
                for job in jobs:
                    if job.state in ("running", "elsewhere"):
                        job.look()
                board.show(jobs, at_once)
            time.sleep(POLL_S)


def _collect(running: dict[int, Running], board: Board, *, stopping: bool) -> None:
    """Take leave of the runs that have ended."""
    for slot, (job, process) in list(running.items()):
        if process.poll() is not None:
            del running[slot]
            job.look()
            job.state = outcome(job, process.returncode, stopping=stopping)
            board.ended(job, log_tail(job.run.log) if job.state == "failed" else "")


def _fill(
    running: dict[int, Running],
    slots: Sequence[Mapping[str, str]],
    jobs: Sequence[Job],
    command: Sequence[str],
    board: Board,
) -> None:
    """Start runs in the slots that are free."""
    for slot, environment in enumerate(slots):
        started = None if slot in running else _start_next(jobs, command, environment)
        if started is not None:
            running[slot] = started
            board.started(started[0])


def _start_next(jobs: Sequence[Job], command: Sequence[str], environment: Mapping[str, str]) -> Running | None:
    """Start the first run that is not done and that no other process is at."""
    for job in jobs:
        if job.state not in OPEN:
            continue
        log = open_log(job.run)
        if log is None:
            job.state = "elsewhere"
            continue
        with log:
            if job.state == "elsewhere":  # it has ended there
                job.look()
                if job.progress.state in DONE:
                    job.state = job.progress.state
                    continue
            job.state = "running"
            return job, start([*command, *job.run.arguments], log, environment)
    return None


def open_log(run: PlannedRun) -> BinaryIO | None:
    """Open a run's log to add to it, and lock it; return None if a process that is running the run holds it.

    The lock goes over to the run with its output and lasts as long as that, even if the sweep is killed.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    log = run.log.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    except OSError:  # a file system without locks
        pass
    return log


def start(command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a run; what it prints is added to its log."""
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone, which passes it on once
    )


def outcome(job: Job, code: int, *, stopping: bool) -> str:
    """Return the state of a run whose process has ended with `code`."""
    if job.progress.state == "diverged":
        return "diverged"
    if code == 0:
        return "finished"
    return "stopped" if code == EXIT_STOPPED or stopping else "failed"  # a launcher has an exit code of its own


def log_tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _signal_all(running: Mapping[int, Running], number: int) -> None:
    """Signal every run's whole process group: its launcher and workers too."""
    for _, process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@contextlib.contextmanager
def _killed_on_the_way_out(running: Mapping[int, Running]) -> Iterator[None]:
    """Leave no process behind, whatever happens; each run continues from its last checkpoint."""
    try:
        yield
    finally:
        _signal_all(running, signal.SIGKILL)


def slot_environments(at_once: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what each run of those at a time gets of the machine: GPUs of its own if there are several, threads."""
    if at_once == 1:
        return [{}]
    devices = visible_devices(environment)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(max(1, cores // at_once))}
    share = max(1, len(devices) // at_once)
    slots = []
    for slot in range(at_once):
        own = [devices[(slot * share + i) % len(devices)] for i in range(share)] if len(devices) > 1 else []
        slots.append(threads | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}))
    return slots


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that a run could use, as CUDA_VISIBLE_DEVICES names them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device for device in listed.split(",") if device.strip()]
    import torch  # here, so that --help, or a command on a login node, need not wait for it

    return [str(i) for i in range(torch.cuda.device_count())]


def launch_command(launch: str, script: Path) -> list[str]:
    """Return what stands before a run's arguments: this Python, or the launcher, and the script.

    Raises:
        ValueError: there is no such launcher.
    """
    launcher = shlex.split(launch) or [sys.executable]
    if shutil.which(launcher[0], path=with_own_programs(os.environ)["PATH"]) is None:
        raise ValueError(f"--launch begins with {launcher[0]!r}; it must be a program that can be found")
    return [*launcher, str(script)]


def with_own_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with the folder of this Python in front of PATH, where `accelerate` is found too."""
    folder = str(Path(sys.executable).parent)
    return {**environment, "PATH": os.pathsep.join(filter(None, [folder, environment.get("PATH")]))}
