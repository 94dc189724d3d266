"""Execution of a sweep by submitit: processes on this machine, or a job array on a Slurm cluster."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import submitit
from submitit.helpers import DelayedSubmission

from moa_train.atomic_io import write_json
from moa_train.errors import ConfigError
from moa_train.reading import read_json
from moa_train.signals import StopRequests
from moa_train.sweep.state import SweepRun, summarize

POLL_S = 0.2
"""Poll interval of processes, seconds."""

LOG_TAIL_LINES = 15
"""Lines of a failed run's log that are printed."""

SLURM_WARNING_S = 120
"""Seconds before the time limit at which Slurm signals a job, so that it saves and is requeued."""


@dataclass
class TrainingJob:
    """Training command as a submitit job: it saves and is requeued before the time limit, and saves on SIGTERM.

    The command saves and exits with 75 on SIGTERM and SIGUSR1; its output is appended to `log`.
    """

    command: list[str]
    log: Path
    environment: dict[str, str] | None = None

    def __call__(self) -> None:
        """Run the command and exit with its code if that is not 0."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(self.command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # a process group for the launcher and its workers
            )
        signal.signal(signal.SIGTERM, self._stop)
        while self._process.poll() is None:
            time.sleep(POLL_S)
        if self._process.returncode:
            sys.exit(self._process.returncode)

    def checkpoint(self) -> DelayedSubmission:
        """Let the run save and end; return the job that resumes it. Called by submitit in its signal handler."""
        self._stop()
        with contextlib.suppress(ChildProcessError):  # it has ended and was waited for
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # Popen.wait cannot be called twice at once
        return DelayedSubmission(TrainingJob(self.command, self.log, self.environment))

    def _stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        # srun kills its tasks on SIGTERM and forwards SIGUSR1; other launchers die of SIGUSR1.
        stop = signal.SIGUSR1 if Path(self.command[0]).name == "srun" else signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, stop)


def launch_command(launcher: str, script: Path) -> list[str]:
    """Return the command that starts a training script; without a launcher such as "accelerate launch", this Python.

    Raises ConfigError if the launcher is neither on PATH nor in the folder of this Python.
    """
    program, *options = shlex.split(launcher) or [sys.executable]
    found = program if shutil.which(program) else shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError(f"--launch starts with {program!r}, which is not a program on PATH")
    return [found, *options, str(script)]


def run_locally(runs: Sequence[SweepRun], command: Sequence[str], at_once: int) -> str:
    """Run all runs that are not done, `at_once` at a time; return the stop signal that ended the sweep early, or "".

    A failed run does not end the others. Ctrl-C, SIGTERM and SIGUSR1 stop the runs, which save. A later Ctrl-C kills
    them.
    """
    waiting = [run for run in runs if not run.done]
    slots = slot_environments(at_once, os.environ)
    active: dict[submitit.Job[None], tuple[SweepRun, dict[str, str]]] = {}
    stopping = False
    with tempfile.TemporaryDirectory() as folder, StopRequests() as stop:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=60 * 24 * 365)
        try:
            while active or (waiting and not stop.received):
                while waiting and slots and not stop.received:
                    run, slot = waiting.pop(0), slots.pop(0)
                    active[_submit(executor, run, command, slot)] = run, slot
                    say("started", f"{run.name} (log: {run.log})")
                if stop.received and not stopping:
                    stopping = True
                    say(stop.received, f"waiting for {len(active)} run(s) to save; Ctrl-C kills them")
                    for job in active:
                        os.kill(int(job.job_id), signal.SIGTERM)
                for job in [job for job in active if job.done()]:
                    run, slot = active.pop(job)
                    slots.append(slot)
                    run.settle("stopped" if stopping else "failed")
                    say(run.state, f"{run.name} (log: {run.log}); {summarize(runs)}")
                    if run.state == "failed" and run.log.exists():
                        log = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
                        print(*log[-LOG_TAIL_LINES:], sep="\n", flush=True)
                time.sleep(POLL_S)
        finally:
            for job in active:
                _kill(int(job.job_id))
    return "" if all(run.done or run.state == "failed" for run in runs) else stop.received


def _submit(
    executor: submitit.LocalExecutor, run: SweepRun, command: Sequence[str], slot: Mapping[str, str]
) -> submitit.Job[None]:
    """Start a run. Its processes ignore the terminal's SIGINT, on which submitit would kill them before they save."""
    run.state = "running"
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(TrainingJob([*command, *run.arguments], run.log.absolute(), {**os.environ, **slot}))
    finally:
        signal.signal(signal.SIGINT, handler)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            each.kill()


def say(title: str, text: str) -> None:
    """Print a line about a run."""
    print(f"{title:<11} {text}", flush=True)


def slot_environments(at_once: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment variables of each of `at_once` parallel runs, which share the GPUs and CPU cores."""
    if at_once == 1:
        return [{}]
    import torch  # not at the top: every job imports this module

    from moa_train.environment import cpu_cores

    listed = environment.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if listed is None else listed.split(",")
    gpus = [name for name in names if name]
    threads = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(max(1, cpu_cores() // at_once))}
    share = max(1, len(gpus) // at_once)
    slots = []
    for slot in range(at_once):
        own = [gpus[(slot * share + i) % len(gpus)] for i in range(share)] if gpus else []
        slots.append({**threads, "CUDA_VISIBLE_DEVICES": ",".join(own)} if own else dict(threads))
    return slots


def submit_to_slurm(
    runs: Sequence[SweepRun], command: Sequence[str], at_once: int | None, options: Mapping[str, str], out: Path
) -> None:
    """Submit the runs that are neither done nor in the queue as one job array, and set the states of all runs.

    Jobs save and requeue themselves before their time limit.

    `options` are those of sbatch, e.g. {"gres": "gpu:8", "time": "24:00:00"}; `out` is on a file system that all nodes
    share. Raises ConfigError if there is no sbatch, or `options` has no time limit.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm needs sbatch; run it on a machine that can submit jobs")
    if "time" not in options:
        raise ConfigError("--sbatch has no time limit; add e.g. time=24:00:00")
    folder = out / "logs" / "slurm"
    record = folder / "jobs.json"
    ids = read_json(record, "cancel the jobs of this sweep and delete the file") if record.exists() else {}
    queue = _read_queue()
    for run in (run for run in runs if not run.done and ids.get(run.name) in queue):
        run.state = "running" if queue[ids[run.name]] == "RUNNING" else "queued"
    new = [run for run in runs if run.state == "waiting"]
    if new:
        executor = _slurm_executor(folder, out.name, at_once or len(new), options)
        jobs = executor.submit_array([TrainingJob([*command, *run.arguments], run.log.absolute()) for run in new])
        write_json(record, ids | {run.name: job.job_id for run, job in zip(new, jobs, strict=True)})
        say("submitted", f"{len(new)} run(s) as job {jobs[0].job_id.partition('_')[0]}")
        for run in new:
            run.state = "queued"


def _slurm_executor(folder: Path, name: str, at_once: int, options: Mapping[str, str]) -> submitit.SlurmExecutor:
    """Return an executor whose jobs run without srun, so that launchers have all resources of the allocation."""
    # `exec` makes the job the batch process, the only one that Slurm signals with "B:".
    executor = submitit.SlurmExecutor(folder, max_num_timeout=10**6, python=f"exec {shlex.quote(sys.executable)}")
    warning = f"B:{submitit.JobEnvironment.USR_SIG}@{SLURM_WARNING_S}"
    executor.update_parameters(
        job_name=name,
        array_parallelism=at_once,
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"signal": warning, "requeue": True, **options},
    )
    return executor


def _read_queue() -> dict[str, str]:
    """Return {job id: state} of the user's jobs in the Slurm queue."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)
