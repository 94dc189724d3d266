"""Command line of scripts/sweep.py: check all runs, run those that are not done, and report on them."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moa_train.errors import ConfigError, DataError
from moa_train.signals import EXIT_STOPPED
from moa_train.sweep.grid import Trainer, check, expand, parse_seeds, parse_settings
from moa_train.sweep.launch import launch_command, run_locally, submit_to_slurm
from moa_train.sweep.state import SweepRun, print_table, summarize

DESCRIPTION = """\
Train every combination of configs, values and seeds, and report on them.

  python scripts/sweep.py --config configs/mae/laptop_{swiglu,qdmoa}.yaml \\
      --set optim.lr=3e-4,6e-4,1.2e-3,2.4e-3 --seeds 3

All configs are checked before the first run starts. The same command continues a sweep: finished runs are skipped,
unfinished ones resume. The output of each run goes to OUT/logs/NAME.log. Arguments after -- are passed to every run:
-- --schedule.epochs 10.
"""

EXITS = """\
exit codes: 0 all runs are done or submitted; 1 a run or the report failed; 2 wrong configuration; 75 stopped, the same
command continues
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        usage="%(prog)s --config FILE [FILE ...] [options] [-- ARGUMENTS FOR EVERY RUN]",
        description=DESCRIPTION,
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("runs")
    what.add_argument("--config", nargs="+", type=Path, required=True, metavar="FILE", help="config files")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="values of a key; several --set are combined. Commas inside [], {} or quotes do not separate",
    )
    what.add_argument("--seeds", default="1", metavar="N", help="number of seeds (3: 0, 1, 2) or a list (0,1,5)")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweep_NAME)")
    how = parser.add_argument_group("execution")
    how.add_argument("--executor", choices=("local", "slurm"), default="local", help="default: %(default)s")
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="parallel runs (default: 1; on Slurm no limit). Local runs share the GPUs and CPU cores",
    )
    how.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="launcher of the script, e.g. 'accelerate launch --num_processes 8'; with --jobs add "
        "--main_process_port 0",
    )
    how.add_argument(
        "--sbatch",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of sbatch, e.g. partition=gpu gres=gpu:8 time=24:00:00",
    )
    how.add_argument("--dry-run", action="store_true", help="check all runs, print commands, states and losses")
    report = parser.add_argument_group("report")
    report.add_argument("--report", metavar="DIR", type=Path, help="its folder (default: reports/NAME of OUT)")
    report.add_argument("--title", help="title of the report")
    report.add_argument("--baseline", metavar="NAME", help="baseline of the report (default: the first config)")
    report.add_argument("--no-report", action="store_true", help="write no report")
    return parser


def main(arguments: Sequence[str], *, find_trainer: Callable[[Sequence[Path]], Trainer], report: Sequence[str]) -> int:
    """Run the sweep of a command line and return the exit code.

    `report` is the command that writes a report; run folders, --out DIR, --title and --baseline are appended.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = build_parser().parse_args(arguments[:end])
    try:
        return _run(options, arguments[end + 1 :], find_trainer, report)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_STOPPED


def _run(
    options: argparse.Namespace,
    extra: Sequence[str],
    find_trainer: Callable[[Sequence[Path]], Trainer],
    report: Sequence[str],
) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}; it must be 1 or above")
    if options.sbatch and options.executor != "slurm":
        raise ConfigError("--sbatch has no effect without --executor slurm; add it")
    settings, seeds = parse_settings(options.set), parse_seeds(options.seeds)
    runs = expand(options.config, settings, seeds, out=options.out, extra=extra)
    trainer = find_trainer(options.config[:1])
    command = launch_command(options.launch, Path(os.path.relpath(trainer.script)))
    for run in runs:
        check(run, trainer)
    if options.dry_run:
        for run in runs:
            print(f"{run.state:<9} {shlex.join([*command, *run.arguments])}")
        print_table(runs)
        return 0
    out = runs[0].folder.parent
    print(f"sweep       {out}: {summarize(runs)}", flush=True)
    if options.executor == "slurm":
        submit_to_slurm(runs, command, options.jobs, _parse_sbatch(options.sbatch), out)
        print_table(runs)
        if not all(run.done for run in runs):
            print("The same command shows the progress, submits failed runs again, and writes the report at the end.")
            return 0
    else:
        stopped = run_locally(runs, command, options.jobs or 1)
        print_table(runs)
        if stopped:
            print(f"stopped     by {stopped}; the same command continues")
            return EXIT_STOPPED
    reported = 0 if options.no_report else _report(runs, options, report, out)
    return 1 if reported or not all(run.done for run in runs) else 0


def _parse_sbatch(texts: Sequence[str]) -> dict[str, str]:
    """Return {"gres": "gpu:8"} for ["gres=gpu:8"]."""
    pairs = [text.removeprefix("--").partition("=") for text in texts]
    if not all(key and value for key, _, value in pairs):
        raise ConfigError(f"--sbatch is {' '.join(texts)!r}; it must be KEY=VALUE ..., e.g. gres=gpu:8")
    return {key: value for key, _, value in pairs}


def _report(runs: Sequence[SweepRun], options: argparse.Namespace, command: Sequence[str], out: Path) -> int:
    """Write the report on the runs that are done; return its exit code."""
    done = [run for run in runs if run.done]
    if not done:
        return 0
    print(f"report      on {len(done)} of {len(runs)} runs", flush=True)
    target = options.report or Path("reports") / out.name
    own = {"--out": target, "--title": options.title, "--baseline": options.baseline}
    words = [str(word) for option, value in own.items() if value is not None for word in (option, value)]
    return subprocess.call([*command, *(str(run.folder) for run in done), *words])
