"""The command line of scripts/sweep.py: check all runs, run or submit those that are not done, report."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from moa_train.signals import EXIT_STOPPED
from moa_train.sweep.board import make_board, overall, table
from moa_train.sweep.check import check, load_main
from moa_train.sweep.grid import expand, parse_seeds, parse_settings
from moa_train.sweep.local import launch_command, run_all
from moa_train.sweep.slurm import Cluster, SlurmError
from moa_train.sweep.state import Job

DESCRIPTION = """\
Run every combination of configs, values and seeds, and report on them.

  python scripts/sweep.py --config configs/mae/laptop_{swiglu,qdmoa}.yaml \\
      --set optim.lr=3e-4,6e-4,1.2e-3,2.4e-3 --seeds 3

All configurations are checked before the first run starts. The same command continues: runs that are done are
skipped, broken ones go on where they were. A run whose loss diverged is done, and marked. Each run's output goes to
OUT/logs/NAME.log. What stands after -- is given to every run: -- --schedule.epochs 10.
"""

EXITS = """\
exit codes: 0 all runs are done; 1 a run or the report failed; 2 wrong configuration; 75 stopped and saved, the same
command continues
"""


def build_parser(script: Path) -> argparse.ArgumentParser:
    """Return the parser of the command line; `script` is the training script unless another is named."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        usage="%(prog)s --config FILE [FILE ...] [options] [-- ARGUMENTS FOR EVERY RUN]",
        description=DESCRIPTION,
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--config", nargs="+", type=Path, required=True, metavar="FILE", help="configuration files")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="values to try of a key; several --set are combined. Commas inside [] {} or quotes do not separate",
    )
    what.add_argument("--seeds", default="1", metavar="N", help="how many seeds (3: 0, 1, 2) or which ones (0,1,5)")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweep_NAME)")
    what.add_argument("--script", type=Path, default=script, help=f"training script (default: {script.name})")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: 1; with --slurm no limit). GPUs, if there are several, and cores are divided",
    )
    how.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="what starts the script instead of python, e.g. 'accelerate launch --num_processes 8'; "
        "with --jobs add --main_process_port 0",
    )
    how.add_argument("--dry-run", action="store_true", help="check, print the commands or the array job, run nothing")
    slurm = parser.add_argument_group("on a cluster")
    slurm.add_argument(
        "--slurm", action="store_true", help="submit one array job; again: show how all do, submit what is left"
    )
    slurm.add_argument(
        "--slurm-args", default="", metavar="ARGS", help="e.g. '--partition=x --gres=gpu:8 --time=24:00:00'"
    )
    slurm.add_argument(
        "--slurm-report-args", metavar="ARGS", help="the same for the job that reports (default: as --slurm-args)"
    )
    report = parser.add_argument_group("the report")
    report.add_argument("--report", metavar="DIR", type=Path, help="where it goes (default: reports/NAME of the sweep)")
    report.add_argument("--title", help="its title")
    report.add_argument("--baseline", metavar="NAME", help="what it compares with (default: the first configuration)")
    report.add_argument("--no-report", action="store_true", help="end without one")
    report.add_argument("--only-report", action="store_true", help="run nothing; report on what is done so far")
    return parser


def main(
    arguments: Sequence[str],
    *,
    script: Path,
    report: Sequence[str],
    mutable_keys: Callable[[], frozenset[str]],
) -> int:
    """Run, or submit, the sweep that `arguments` describe and return the exit code.

    Args:
        arguments: The command line.
        script: The training script unless the command line names another.
        report: Command that writes a report; run folders, --out DIR and --title TITLE are added.
        mutable_keys: Returns the keys that may change when a run is resumed; called after the script is loaded.
    """
    options, extra = _parse(build_parser(_relative(script)), list(arguments))
    try:
        runs = expand(
            options.config, parse_settings(options.set), parse_seeds(options.seeds), out=options.out, extra=extra
        )
        command = launch_command(options.launch, options.script)
        jobs = check(runs, load_main(options.script), mutable_keys())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return Sweep(options, jobs, command, report, arguments).run()
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options before "--" and the arguments after it; exits with code 2 if they cannot be."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(_joined(arguments[:end]))
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: {options.jobs} must be 1 or above")
    return options, arguments[end + 1 :]


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return ["--slurm-args=--mem=8G"] for ["--slurm-args", "--mem=8G"]: argparse takes the value for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--slurm-args", "--slurm-report-args"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _relative(path: Path) -> Path:
    """Return a path below the working directory without it: runs record their commands."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class Sweep:
    """A checked sweep; see `main`."""

    def __init__(
        self,
        options: argparse.Namespace,
        jobs: list[Job],
        command: list[str],
        report: Sequence[str],
        arguments: Sequence[str],
    ) -> None:
        self.options, self.jobs, self.command, self.arguments = options, jobs, command, arguments
        self.out = jobs[0].run.out
        self._report = report

    def run(self) -> int:
        """Do what the options say; return the exit code."""
        if self.options.only_report:
            return self.report()
        if self.options.slurm:
            return self.on_cluster()
        if self.options.dry_run:
            for job in self.jobs:
                print(("# done: " if job.done else "") + shlex.join([*self.command, *job.run.arguments]))
            return 0
        return self.here()

    def here(self) -> int:
        """Run on this machine, and report."""
        skipped = sum(job.skipped for job in self.jobs)
        before = f", {skipped} of them done before" if skipped else ""
        at_once = self.options.jobs or 1
        with make_board() as board:
            board.say(f"sweep       {len(self.jobs)} runs in {self.out}{before}")
            received = run_all(self.jobs, self.command, board, at_once=at_once)
            board.show(self.jobs, at_once)
        failed = [job.run for job in self.jobs if job.state == "failed"]
        for run in failed:
            print(f"failed      {run.name}: see {run.log}")
        if received:
            print(f"stopped     {received}; the same command continues")
            return EXIT_STOPPED
        reported = self.report()
        if failed or reported:
            return 1
        return 0 if all(job.done for job in self.jobs) else EXIT_STOPPED

    def report(self) -> int:
        """Report on the runs that are done; return the exit code."""
        worth = [job for job in self.jobs if job.done]
        if self.options.no_report or not worth:
            return 0
        print(f"report      on {len(worth)} of {len(self.jobs)} runs", flush=True)
        return subprocess.call(self._report_command(worth))

    def _report_command(self, jobs: Sequence[Job]) -> list[str]:
        out = self.options.report or Path("reports") / self.out.name
        given = {"--title": self.options.title, "--baseline": self.options.baseline}
        options = [word for option, value in given.items() if value is not None for word in (option, value)]
        return [*self._report, *(str(job.run.folder) for job in jobs), "--out", str(out), *options]

    def on_cluster(self) -> int:
        """Show how all runs do, and submit those that are neither done nor in the queue."""
        options = self.options
        report_arguments = options.slurm_args if options.slurm_report_args is None else options.slurm_report_args
        cluster = Cluster(self.out, options.slurm_args, report_arguments)
        queued = cluster.look(self.jobs)
        waiting = sum(job.state == "waiting" for job in self.jobs)
        if options.dry_run:
            print(cluster.array_script(self.jobs, self.command, options.jobs))
            return 0
        Console().print(table(self.jobs, len(self.jobs)))
        print(overall(self.jobs, options.jobs or len(self.jobs)))
        if waiting:
            cluster.write(self.jobs, self.command, options.jobs)
            queued.append(cluster.submit(self.jobs))
            print(f"submitted   {waiting} runs as job {queued[-1]} ({cluster.script})")
            if not options.no_report:
                number = cluster.submit_report(self._only_report(), queued)
                print(f"            and their report as job {number}")
            return 0
        return self.report() if not queued else 0

    def _only_report(self) -> list[str]:
        """Return this command, for a report on whatever will be done by then."""
        own = [sys.executable, os.path.relpath(sys.argv[0]), "--only-report"]
        return [*own, *self.arguments]
