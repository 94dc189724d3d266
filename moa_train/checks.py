"""Checks of a data set's files against its manifest: what one finds, and many of them in worker processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from moa_train.progress import CountBar
from moa_train.signals import end_with_parent

_SHARD = re.compile(r".+\.(tar|tar\.gz|tgz)|shard-.+\.safetensors")


class Problem(NamedTuple):
    """What is wrong with a file or with a sample in it.

    Attributes:
        file: its path or address.
        sample: its name; "" where the file as a whole is meant.
        text: what is wrong.
    """

    file: str
    sample: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        where = f"{self.file}: {self.sample}" if self.sample else self.file
        return " ".join(f"{where}: {self.text}".split())


class Checked(NamedTuple):
    """What the check of one file found.

    Attributes:
        samples: how many were looked at; of token shards, tokens.
        bytes: how many were read.
        problems: all there are.
    """

    samples: int
    bytes: int
    problems: list[Problem]


class Plan(NamedTuple):
    """How a data set is checked.

    Attributes:
        name: of the set.
        unit: what its samples are.
        bytes: of all files, as the manifest says.
        problems: those found without reading the shards.
        checks: one a shard; each may run in a process of its own.
        note: what is not checked.
    """

    name: str
    unit: str
    bytes: int
    problems: list[Problem]
    checks: Sequence[Callable[[], Checked]]
    note: str = ""


def shards_in(folder: Path) -> list[str]:
    """Return the names of what are shards of images or tokens by their names, sorted; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def unlisted(folder: Path, names: Sequence[str]) -> list[Problem]:
    """Return the shards in a data set's folder that its manifest does not list: no run reads them."""
    text = "its manifest does not list it; make or copy the set again, or delete what is none of it"
    return [Problem(str(folder / name), "", text) for name in shards_in(folder) if name not in set(names)]


def run_checks(plan: Plan, workers: int) -> Iterator[Checked]:
    """Run the checks of a plan, `workers` at a time (1: in this process), and yield what each found as it ends.

    Raises:
        ValueError: there is no worker.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; allowed: 1 or more")
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
