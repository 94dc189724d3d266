"""Checks data sets against their manifests: image shards of make_shards.py, token shards of make_tokens.py.

  python scripts/check_shards.py data/mine                        # its folders train and val, if it has such
  python scripts/check_shards.py data/imagenet/train --decode --workers 32
  python scripts/check_shards.py https://host/shards/train        # fetches each shard, and deletes it

Read are all bytes: sizes, SHA-256, the members of each tar against the index, tokens and ends of documents, the
tokenizer; with --decode the images too. Every problem is told in a line of its own: shards that no manifest lists are
problems too.

Exit codes: 0 all is well, 1 there are problems, 2 wrong usage, 141 whoever reads the lines has stopped reading.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from moa_train.checks import Plan, Problem, run_checks, shards_in
from moa_train.progress import duration

MANIFEST = "manifest.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", help="of data sets, or http(s)://, hf:// of image shards", nargs="+", metavar="DIR"
    )
    parser.add_argument("--decode", help="decode every image too", action="store_true")
    parser.add_argument(
        "--workers", help="processes (default: %(default)s)", type=int, default=os.cpu_count() or 1, metavar="N"
    )
    parser.add_argument(
        "--cache-dir", help="remote shards are there while checked (default: ~/.cache/moa_vision)", metavar="DIR"
    )
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers is {given.workers}; allowed: 1 or more")
    given.sets = []
    for name in given.folders:
        sets = [name] if "://" in name else sets_of(Path(name))
        given.sets += sets
        if not sets:
            parser.error(f"{name} holds no {MANIFEST} and no shards, nor do its folders train and val")
    return given


def sets_of(folder: Path) -> list[str]:
    """The data sets that a folder is or holds, those whose manifest is missing included."""
    below = [path for path in (folder / "train", folder / "val") if has_manifest(path) or shards_in(path)]
    own = has_manifest(folder) or (not below and shards_in(folder))  # else tars beside data sets: their source
    return [str(path) for path in ([folder] if own else []) + below]


def has_manifest(folder: Path) -> bool:
    """Whether a folder holds a data set that is finished."""
    return (folder / MANIFEST).exists()


def plan_of(folder: str, given: argparse.Namespace) -> Plan:
    """How a data set is checked: as its manifest says what it is."""
    remote = "://" in folder
    if not remote and not has_manifest(Path(folder)):
        text = "is missing, but there are shards; run the command that made them again, or copy the set anew"
        return Plan(folder, "samples", 0, [Problem(f"{folder}/{MANIFEST}", "", text)], [])
    if not remote and is_of_tokens(Path(folder) / MANIFEST):
        from moa_lm.check import plan_check as plan_tokens  # imported here: each half has heavy dependencies

        return plan_tokens(Path(folder))
    from moa_vision.check import plan_check as plan_images

    cache_dir = Path(given.cache_dir).expanduser() if given.cache_dir else None
    return plan_images(f"{folder.rstrip('/')}/{MANIFEST}", decode=given.decode, cache_dir=cache_dir)


def is_of_tokens(manifest: Path) -> bool:
    """Whether a manifest says that it is of tokens; one that says nothing is taken for one of images."""
    try:
        return str(json.loads(manifest.read_bytes())["format"]).startswith("moa-tokens")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    given = parse(arguments)
    begin = time.monotonic()
    say = tqdm.write if sys.stderr.isatty() else print  # past the live bar; a log's lines need not make way
    total = 0
    for folder in given.sets:
        plan = plan_of(folder, given)
        count = len(plan.problems)
        for problem in plan.problems:
            say(str(problem))
        samples = size = 0
        for checked in run_checks(plan, given.workers):
            for problem in checked.problems:
                say(str(problem))
            count += len(checked.problems)
            samples, size = samples + checked.samples, size + checked.bytes
        print(f"{folder}: {len(plan.checks)} shards, {samples:,} {plan.unit}, {size / 2**20:.1f} MiB: ", end="")
        print(f"{count} problem{'s' * (count != 1)}" if count else "all is well")
        total += count
    print(f"{len(given.sets)} data sets checked in {duration(time.monotonic() - begin)}: {total} problems")
    return 1 if total else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as "| head" does; what is still to be flushed at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as of a process that SIGPIPE ended
    sys.exit(code)
