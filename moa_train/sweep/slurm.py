"""The runs of a sweep on a Slurm cluster: one array job, and a job for the report after it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moa_train.atomic_io import write_json, write_text
from moa_train.reading import read_json
from moa_train.signals import EXIT_STOPPED
from moa_train.sweep.local import with_own_programs
from moa_train.sweep.state import Job

WARNING_S = 120
"""Seconds before its time is up at which Slurm warns a job, which saves and is queued again."""

SCRIPT = r"""#!/bin/bash
# Written by scripts/sweep.py, which submits it. A task is a run; one that is out of time saves, and is queued again.
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --output={logs}/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
#SBATCH {arguments}
cd {folder} || exit 1
export PATH={path}:"$PATH"
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "no run has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac

# The run has a process group of its own, so that a launcher's workers get the signal too. `wait` returns early when a
# signal comes; the run is waited for again while it saves.
setsid "${{run[@]}}" >>"$log" 2>&1 &
child=$!
warned=
pass_on() {{ again=yes; kill -{signal} -- "-$child" 2>/dev/null || kill -{signal} "$child"; }}
trap 'warned=yes; pass_on' USR1
trap pass_on TERM
code={stopped}
again=yes
while [ -n "$again" ]; do
    again=
    wait "$child"
    status=$?
    [ "$status" -eq 127 ] || code=$status
done
# Out of time: again, unless it has just finished. A job that is cancelled gets TERM alone, and stays cancelled.
# The code says little here: the run's own is {stopped}, a launcher's is another.
if [ -n "$warned" ] && [ "$code" -ne 0 ]; then
    exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""

REPORT = r"""#!/bin/bash
# Written by scripts/sweep.py, which submits it to run when all runs have ended.
#SBATCH --job-name={name}_report
#SBATCH --output={logs}/report.log
#SBATCH {arguments}
cd {folder} || exit 1
export PATH={path}:"$PATH"
exec {report}
"""


class SlurmError(Exception):
    """A Slurm command is missing or failed; the message is its own."""


class Cluster:
    """The sweep's part of a cluster's queue.

    Args:
        out: Folder of the runs; sweep.sbatch, report.sbatch and slurm.json (which job has which runs) are kept in it.
        arguments: sbatch's arguments for a run, e.g. "--partition=gpu --gres=gpu:8 --time=24:00:00".
        report_arguments: sbatch's arguments for the report.
    """

    def __init__(self, out: Path, arguments: str, report_arguments: str) -> None:
        self.out, self.arguments, self.report_arguments = out, arguments, report_arguments
        self.script, self.report_script = out / "sweep.sbatch", out / "report.sbatch"
        self._jobs = out / "slurm.json"

    def look(self, jobs: Sequence[Job]) -> list[str]:
        """Bring the state of each run that is in the queue up to date; return the jobs that they belong to.

        Raises:
            SlurmError: the queue cannot be read.
        """
        known = self._known()
        by_name = {job.run.name: job for job in jobs}
        queue = _call(["squeue", "--me", "--noheader", "--array", "--format=%F %K %T"]) if known else ""
        live = set()
        for number, index, state in (line.split()[:3] for line in queue.splitlines()):
            names = known.get(number, [])
            if not index.isdigit() or int(index) >= len(names) or state in ENDED:
                continue
            live.add(number)
            job = by_name.get(names[int(index)])
            if job is not None and not job.done:
                job.state = "running" if state in RUNNING else "queued"
        return sorted(live)

    def write(self, jobs: Sequence[Job], command: Sequence[str], at_once: int | None) -> None:
        """Write the array script; its tasks are the waiting runs, numbered by their place in the sweep."""
        self.out.joinpath("logs").mkdir(parents=True, exist_ok=True)
        write_text(self.script, self.array_script(jobs, command, at_once))

    def array_script(self, jobs: Sequence[Job], command: Sequence[str], at_once: int | None) -> str:
        """Return the array script."""
        waiting = [i for i, job in enumerate(jobs) if job.state == "waiting"]
        cases = [
            f"{i}) log={shlex.quote(str(jobs[i].run.log))}; run=({shlex.join([*command, *jobs[i].run.arguments])}) ;;"
            for i in waiting
        ]
        limit = "" if at_once is None else f"%{at_once}"
        return SCRIPT.format(
            array=",".join(map(str, waiting)) + limit,
            cases="\n".join(cases),
            warning=WARNING_S,
            stopped=EXIT_STOPPED,
            signal=stop_signal(command),
            **self._common(self.arguments),
        )

    def submit(self, jobs: Sequence[Job]) -> str:
        """Submit the array script that was written; return the job's number. Raises SlurmError."""
        known = self._known()  # before anything is submitted that could not be written down
        number = _submit(self.script)
        write_json(self._jobs, {**known, number: [job.run.name for job in jobs]})
        return number

    def submit_report(self, report: Sequence[str], after: Sequence[str]) -> str:
        """Write and submit the report's script, to run when the jobs `after` have ended; return its number."""
        text = REPORT.format(report=shlex.join(report), **self._common(self.report_arguments))
        write_text(self.report_script, text)
        return _submit(self.report_script, f"--dependency=afterany:{':'.join(after)}")

    def _known(self) -> dict[str, list[str]]:
        """Return the runs of each job that was submitted. Raises SlurmError if the list of them is damaged."""
        if not self._jobs.exists():
            return {}
        remedy = "look at squeue for jobs of this sweep, cancel them, and delete the file"
        try:
            known = read_json(self._jobs, remedy)
        except ValueError as error:
            raise SlurmError(str(error)) from error
        for number, names in known.items():
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise SlurmError(f"{self._jobs} has no list of runs for job {number!r}; {remedy}")
        return known

    def _common(self, arguments: str) -> dict[str, str]:
        return {
            "name": self.out.name,
            "logs": str(self.out / "logs"),
            "arguments": arguments or "--comment=moa",
            "folder": shlex.quote(str(Path.cwd())),
            "path": shlex.quote(with_own_programs({})["PATH"]),
        }


def stop_signal(command: Sequence[str]) -> str:
    """Return the signal that asks `command` to stop: srun kills its tasks on SIGTERM, and passes on SIGUSR1, of which
    other launchers die.
    """
    return "USR1" if Path(command[0]).name == "srun" else "TERM"


RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""Slurm's words for a job that has its nodes."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
"""Slurm's words for a job that will not run again."""


def _submit(script: Path, *options: str) -> str:
    return _call(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def _call(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} was not found; --slurm needs a machine that can submit to Slurm") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"{shlex.join(command)} failed: {error.stderr.strip()}") from error
