"""Benchmarks: every figure is a median over alternating rounds of one run, with its 20th and 80th percentile.

    python scripts/benchmark.py WHAT [options]
    python scripts/benchmark.py WHAT --help

Ratios are taken round by round, so that a machine whose speed drifts does not decide them. Tables are Markdown on
stdout, with device and versions above them; the same lines are written to CSV files under --out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import evaluation, ffn, infer, lm, loader, mae, options, overhead, recipe, saving, startup

BENCHMARKS = {
    "ffn": ffn,
    "overhead": overhead,
    "infer": infer,
    "lm": lm,
    "mae": mae,
    "recipe": recipe,
    "loader": loader,
    "saving": saving,
    "startup": startup,
    "eval": evaluation,
}


def build_parser() -> argparse.ArgumentParser:
    """One subcommand a benchmark, described by its module's docstring, and `all`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, module in BENCHMARKS.items():
        description = module.__doc__ or ""
        command = commands.add_parser(
            name, help=description.splitlines()[0], description=description, formatter_class=form, allow_abbrev=False
        )
        module.add_arguments(command)
    everything = commands.add_parser("all", help="all of them with their own defaults")
    everything.add_argument("--device", type=options.device, help="torch device, for those that take one")
    everything.add_argument("--rounds", type=options.positive, help="rounds of all but eval")
    everything.add_argument("--out", type=Path, help="folder of the CSV files")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run; exit code 2 with a message where something asked for cannot be."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    for name in BENCHMARKS if args.what == "all" else [args.what]:
        chosen = parser.parse_args([name, *shared(name, args)]) if args.what == "all" else args
        try:
            options.for_device(chosen)
            BENCHMARKS[name].run(chosen)
        except ValueError as error:
            parser.exit(2, f"benchmark.py {name}: error: {error}\n")


def shared(name: str, args: argparse.Namespace) -> list[str]:
    """What `all` passes on to one benchmark."""
    taken = {"loader": ("rounds", "out"), "startup": ("rounds", "out"), "eval": ("device",)}
    given = {key: getattr(args, key) for key in taken.get(name, ("device", "rounds", "out"))}
    return [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]


if __name__ == "__main__":
    main()
