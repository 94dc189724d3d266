"""Checks of packed data sets against their manifests, in worker processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from moa_train.errors import require
from moa_train.progress import CountBar
from moa_train.signals import end_with_parent

_SHARD = re.compile(r".+\.tar|shard-.+\.safetensors")


class Problem(NamedTuple):
    """A problem of a file (path or URL), or of a sample in it if `sample` is not ""."""

    file: str
    sample: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        where = f"{self.file}: {self.sample}" if self.sample else self.file
        return " ".join(f"{where}: {self.text}".split())


class Checked(NamedTuple):
    """Result of checking one file: number of samples (of token shards, tokens), bytes read, and problems."""

    samples: int
    bytes: int
    problems: list[Problem]


class Plan(NamedTuple):
    """Checks of a data set, one per shard.

    `unit` names a sample, `bytes` is the size of all files in the manifest, `problems` were found without reading the
    shards, and `note` says what is not checked.
    """

    name: str
    unit: str
    bytes: int
    problems: list[Problem]
    checks: Sequence[Callable[[], Checked]]
    note: str = ""


def shards_in(folder: Path) -> list[str]:
    """Return the sorted names of image and token shards in a folder; empty without the folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def unlisted(folder: Path, names: Sequence[str]) -> list[Problem]:
    """Return a problem for each shard in the folder that the manifest does not list."""
    text = "the manifest does not list it; pack or copy the data set again, or delete this file"
    return [Problem(str(folder / name), "", text) for name in shards_in(folder) if name not in set(names)]


def run_checks(plan: Plan, workers: int) -> Iterator[Checked]:
    """Run the checks of a plan in `workers` processes (1: in this process); yield their results as they finish.

    Raises ConfigError if `workers` is below 1.
    """
    require("workers", workers, workers >= 1, "1 or above")
    with CountBar(total=plan.bytes, title=f"check {plan.name}", unit="B") as bar:
        bar.unit_scale = True
        for checked in _results(plan.checks, workers):
            bar.update(checked.bytes)
            yield checked


def _results(checks: Sequence[Callable[[], Checked]], workers: int) -> Iterator[Checked]:
    if workers == 1 or len(checks) <= 1:
        for check in checks:
            yield check()
        return
    with ProcessPoolExecutor(min(workers, len(checks)), initializer=end_with_parent) as pool:
        futures = [pool.submit(check) for check in checks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
