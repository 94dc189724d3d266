"""Checks data sets: image shards of make_shards.py, token shards of make_tokens.py, tars without a manifest.

  python scripts/check_shards.py data/mine                        # its folders train and val, if it has such
  python scripts/check_shards.py data/imagenet/train --decode --workers 32
  python scripts/check_shards.py https://host/shards/train        # fetches each shard, and deletes it
  python scripts/check_shards.py 'public/train-{0000..0127}.tar' --decode

Read are all bytes: sizes, SHA-256, the members of each tar against the index, tokens and ends of documents, the
tokenizer; with --decode the images too. Every problem is told in a line of its own: shards that no manifest lists are
problems too. Of tars without a manifest, in a folder or by path, {brace}, glob, http(s)://, hf://, the headers,
members and labels are checked, and with --decode the images.

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
        "folders",
        help="of data sets, or http(s)://, hf:// of image shards, or tars by path, brace or glob",
        nargs="+",
        metavar="DIR",
    )
    parser.add_argument("--decode", help="decode every image too", action="store_true")
    parser.add_argument(
        "--image-key", help="of tars without a manifest: which member is the image, e.g. input.jpg", metavar="NAME"
    )
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
        sets = sets_of(Path(name)) if Path(name).is_dir() else [name]
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


def plans_of(name: str, given: argparse.Namespace) -> list[Plan]:
    """How data sets are checked: as their manifests say what they are. Raises ValueError if `name` names none."""
    folder = Path(name)
    if is_incomplete(folder):
        text = "is missing, but there are shards; run the command that made them again, or copy the set anew"
        return [Plan(name, "samples", 0, [Problem(f"{name}/{MANIFEST}", "", text)], [])]
    if is_of_tokens(folder / MANIFEST):
        from moa_lm.check import plan_check as plan_tokens  # imported here: each half has heavy dependencies

        return [plan_tokens(folder)]
    from moa_vision.check import plan_check, plan_tars
    from moa_vision.index import expand

    options = {"decode": given.decode, "cache_dir": Path(given.cache_dir).expanduser() if given.cache_dir else None}
    names = expand(name)
    tars = [url for url in names if not url.endswith(MANIFEST)]
    plans = [plan_check(url, **options) for url in names if url.endswith(MANIFEST)]
    return [*plans, plan_tars(name, tars, **options, image_key=given.image_key)] if tars else plans


def is_incomplete(folder: Path) -> bool:
    """Whether a folder holds shards of ours without their manifest: of tokens, unfinished, or with an index."""
    ours = (".parts", "index.safetensors")
    tokens = any(name.endswith(".safetensors") for name in shards_in(folder))
    return folder.is_dir() and not has_manifest(folder) and (tokens or any((folder / name).exists() for name in ours))


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
    try:
        plans = [plan for name in given.sets for plan in plans_of(name, given)]
    except ValueError as error:
        print(f"check_shards: {error}", file=sys.stderr)
        return 2
    for plan in plans:
        count = len(plan.problems)
        for problem in plan.problems:
            say(str(problem))
        samples = size = 0
        for checked in run_checks(plan, given.workers):
            for problem in checked.problems:
                say(str(problem))
            count += len(checked.problems)
            samples, size = samples + checked.samples, size + checked.bytes
        print(f"{plan.name}: {len(plan.checks)} shards, {samples:,} {plan.unit}, {size / 2**20:.1f} MiB: ", end="")
        print(f"{count} problem{'s' * (count != 1)}" if count else "all is well", end="")
        print(f" ({plan.note})" if plan.note else "")
        total += count
    print(f"{len(plans)} data sets checked in {duration(time.monotonic() - begin)}: {total} problems")
    return 1 if total else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as "| head" does; what is still to be flushed at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as of a process that SIGPIPE ended
    sys.exit(code)
