"""Check data sets: image shards of make_shards.py and token shards of make_tokens.py.

  python scripts/check_shards.py data/mine                        # or its folders train and val
  python scripts/check_shards.py data/imagenet/train --decode --workers 32

Reads all bytes: sizes, SHA-256, tar members against the index, tokens and ends of documents, the tokenizer; with
--decode also the images. Prints one line for each problem; shards that no manifest lists are problems too.

Exit codes: 0 no problem, 1 problems found, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from moa_train.checks import Plan, Problem, run_checks, shards_in
from moa_train.manifest import MANIFEST
from moa_train.progress import duration


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="folders of data sets, or with folders train and val")
    add("--decode", action="store_true", help="also decode every image")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; it must be 1 or above")
    args.sets = []
    for folder in args.folders:
        sets = sets_of(folder)
        args.sets += sets
        if not sets:
            parser.error(f"{folder} has no {MANIFEST} and no shards, nor have its folders train and val")
    return args


def sets_of(folder: Path) -> list[Path]:
    """Return the data sets that a folder is or contains, including those without a manifest."""
    below = [path for path in (folder / "train", folder / "val") if has_manifest(path) or shards_in(path)]
    own = has_manifest(folder) or (not below and shards_in(folder))  # tars next to train and val are their source
    return ([folder] if own else []) + below


def has_manifest(folder: Path) -> bool:
    """Return whether a folder is a finished data set."""
    return (folder / MANIFEST).exists()


def plan_of(folder: Path, decode: bool) -> Plan:
    """Return the checks of one data set."""
    if not has_manifest(folder):
        text = "is missing although there are shards; run the packing command again, or copy the data set again"
        return Plan(str(folder), "samples", 0, [Problem(str(folder / MANIFEST), "", text)], [])
    if has_tokens(folder / MANIFEST):
        from moa_lm.check import plan_check as plan_tokens  # imported here: each half has heavy dependencies

        return plan_tokens(folder)
    from moa_vision.check import plan_check

    return plan_check(folder, decode=decode)


def has_tokens(manifest: Path) -> bool:
    """Return whether a manifest is of token shards; a damaged one counts as one of images, which reports it."""
    try:
        content = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith("moa-tokens")


def run(plan: Plan, workers: int) -> int:
    """Run a plan, print its problems and a summary, and return the number of problems."""
    say = tqdm.write if sys.stderr.isatty() else print  # above the live bar
    count = len(plan.problems)
    for problem in plan.problems:
        say(str(problem))
    samples = size = 0
    for checked in run_checks(plan, workers):
        for problem in checked.problems:
            say(str(problem))
        count += len(checked.problems)
        samples, size = samples + checked.samples, size + checked.bytes
    result = f"{count} problem{'s' * (count != 1)}" if count else "no problems"
    print(f"{plan.name}: {len(plan.checks)} shards, {samples:,} {plan.unit}, {size / 2**20:.1f} MiB: {result}")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(arguments)
    begin = time.monotonic()
    total = sum(run(plan_of(folder, args.decode), args.workers) for folder in args.sets)
    print(f"{len(args.sets)} data sets checked in {duration(time.monotonic() - begin)}: {total} problems")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
