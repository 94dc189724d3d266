"""Benchmarks: medians over alternating rounds of one run, with their 20th and 80th percentiles.

    python -m benchmarks NAME [options]
    python -m benchmarks NAME --help
    python -m benchmarks all

Ratios are taken round by round, so that a drifting machine speed cancels. Tables are Markdown on stdout, below device
and versions; the same rows are written to CSV files in --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks import options
from moa_train.errors import ConfigError, DataError

MODULES = ("ffn", "overhead", "infer", "lm", "mae", "recipe", "loader", "saving", "tune")
BENCHMARKS = {module: module for module in MODULES} | {"eval": "evaluation"}
"""Module of each benchmark. Only those that a command names are imported: others may need packages that are absent."""


def build_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with a subcommand for each benchmark, described by its module's docstring, and `all`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    common = options.common_parser()
    for name in names:
        module = import_module(f"benchmarks.{BENCHMARKS[name]}")
        text = module.__doc__ or ""
        settings = {"help": text.splitlines()[0], "description": text, "formatter_class": formatter}
        module.add_arguments(commands.add_parser(name, parents=[common], **settings))
    commands.add_parser("all", parents=[common], help="all benchmarks with their default options")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one benchmark, or all of them. Wrong options exit with code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser([word for word in words[:1] if word in BENCHMARKS] or [*BENCHMARKS])
    args = parser.parse_args(words)
    if args.name == "all":
        for name in BENCHMARKS:
            main([name, *words[1:]])
        return
    try:
        import_module(f"benchmarks.{BENCHMARKS[args.name]}").run(args)
    except (ConfigError, DataError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
