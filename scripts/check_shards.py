"""Check data sets: image shards of make_shards.py, token shards of make_tokens.py, and tars without a manifest.

  python scripts/check_shards.py data/mine                        # or its folders train and val
  python scripts/check_shards.py data/imagenet/train --decode --workers 32
  python scripts/check_shards.py https://host/shards/train        # fetches and deletes each shard
  python scripts/check_shards.py 'public/train-{0000..0127}.tar' --decode

Reads all bytes: sizes, SHA-256, tar members against the index, tokens and ends of documents, the tokenizer; with
--decode also the images. Prints one line for each problem; shards that no manifest lists are problems too. For tars
without a manifest, it checks headers, members and labels, and with --decode the images.

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
from moa_train.errors import ConfigError, DataError
from moa_train.manifest import MANIFEST
from moa_train.progress import duration


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folder, or image tars by path, brace, glob, http(s):// or hf://")
    add("--decode", action="store_true", help="also decode every image")
    add("--image-key", metavar="NAME", help="image member of tars without a manifest, e.g. input.jpg")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")
    add("--cache-dir", metavar="DIR", help="temporary place of remote shards (default: ~/.cache/moa_vision)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; it must be 1 or above")
    args.sets = []
    for name in args.folders:
        sets = sets_of(Path(name)) if Path(name).is_dir() else [name]
        args.sets += sets
        if not sets:
            parser.error(f"{name} has no {MANIFEST} and no shards, nor have its folders train and val")
    return args


def sets_of(folder: Path) -> list[str]:
    """Return the data sets that a folder is or contains, including those without a manifest."""
    below = [path for path in (folder / "train", folder / "val") if has_manifest(path) or shards_in(path)]
    own = has_manifest(folder) or (not below and shards_in(folder))  # tars next to train and val are their source
    return [str(path) for path in ([folder] if own else []) + below]


def has_manifest(folder: Path) -> bool:
    """Return whether a folder is a finished data set."""
    return (folder / MANIFEST).exists()


def plans_of(name: str, args: argparse.Namespace) -> list[Plan]:
    """Return the checks of the data sets that `name` names. Raises ConfigError if there are none."""
    folder = Path(name)
    if is_incomplete(folder):
        text = "is missing although there are shards; run the packing command again, or copy the data set again"
        return [Plan(name, "samples", 0, [Problem(f"{name}/{MANIFEST}", "", text)], [])]
    if has_tokens(folder / MANIFEST):
        from moa_lm.check import plan_check as plan_tokens  # imported here: each half has heavy dependencies

        return [plan_tokens(folder)]
    from moa_vision.cache import default_cache_dir
    from moa_vision.check import plan_check, plan_tars
    from moa_vision.index import expand

    cache_dir = Path(args.cache_dir).expanduser() if args.cache_dir else default_cache_dir()
    options = {"decode": args.decode, "cache_dir": cache_dir}
    names = expand(name)
    tars = [url for url in names if not url.endswith(MANIFEST)]
    plans = [plan_check(url, **options) for url in names if url.endswith(MANIFEST)]
    return [*plans, plan_tars(name, tars, **options, image_key=args.image_key)] if tars else plans


def is_incomplete(folder: Path) -> bool:
    """Return whether a folder has packed shards but no manifest: token shards, or files of make_shards.py."""
    if not folder.is_dir() or has_manifest(folder):
        return False
    packed = any((folder / name).exists() for name in (".parts", "index.safetensors"))
    return packed or any(name.endswith(".safetensors") for name in shards_in(folder))


def has_tokens(manifest: Path) -> bool:
    """Return whether a local manifest is of token shards; a damaged one counts as one of images, which reports it."""
    try:
        content = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
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
    note = f" ({plan.note})" if plan.note else ""
    print(f"{plan.name}: {len(plan.checks)} shards, {samples:,} {plan.unit}, {size / 2**20:.1f} MiB: {result}{note}")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(arguments)
    begin = time.monotonic()
    try:
        plans = [plan for name in args.sets for plan in plans_of(name, args)]
    except (ConfigError, DataError) as error:
        print(f"check_shards: error: {error}", file=sys.stderr)
        return 2
    total = sum(run(plan, args.workers) for plan in plans)
    print(f"{len(plans)} data sets checked in {duration(time.monotonic() - begin)}: {total} problems")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
