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

from benchmarks import evaluation, ffn, infer, lm, loader, mae, options, overhead, recipe, saving, tune
from moa_train.errors import ConfigError, DataError

BENCHMARKS = {
    "ffn": ffn,
    "overhead": overhead,
    "infer": infer,
    "lm": lm,
    "mae": mae,
    "recipe": recipe,
    "loader": loader,
    "saving": saving,
    "tune": tune,
    "eval": evaluation,
}


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with a subcommand for each benchmark, described by its module's docstring, and `all`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    common = options.common_parser()
    for name, module in BENCHMARKS.items():
        text = module.__doc__ or ""
        settings = {"help": text.splitlines()[0], "description": text, "formatter_class": formatter}
        module.add_arguments(commands.add_parser(name, parents=[common], **settings))
    commands.add_parser("all", parents=[common], help="all benchmarks with their default options")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one benchmark, or all of them. Wrong options exit with code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    args = parser.parse_args(words)
    if args.name == "all":
        for name in BENCHMARKS:
            main([name, *words[1:]])
        return
    try:
        BENCHMARKS[args.name].run(args)
    except (ConfigError, DataError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
