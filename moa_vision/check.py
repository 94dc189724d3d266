"""Checks of image shards: bytes against the manifest, tar members against the index, and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa_train.checks import Checked, Plan, Problem, unlisted
from moa_train.errors import DataError
from moa_train.manifest import MANIFEST, file_problem
from moa_vision.images import ImageError, decode_image
from moa_vision.index import load_manifest
from moa_vision.table import SampleTable, index_tar


def plan_check(folder: Path, *, decode: bool = False) -> Plan:
    """Plan the check of the data set in `folder`; its manifest and index are checked at once."""
    try:
        manifest = load_manifest(str(folder / MANIFEST))
    except DataError as error:
        return Plan(str(folder), "images", 0, [Problem(str(folder / MANIFEST), "", str(error))], [])
    entries, index = manifest["shards"], folder / manifest["index"]["name"]
    problems = unlisted(folder, [entry["name"] for entry in entries])
    table: SampleTable | None = None
    try:
        problems += _file_problems(index, manifest["index"])
        table = SampleTable.from_bytes(index.read_bytes())
    except (OSError, DataError) as error:
        problems.append(Problem(str(index), "", str(error)))
    if table is not None and len(table) != manifest["samples"]:
        problems.append(Problem(str(index), "", f"has {len(table)} samples, the manifest lists {manifest['samples']}"))
        table = None
    checks = []
    first = 0
    for entry in entries:
        last = first + entry["samples"]
        listed = None if table is None else table.rows(first, last)
        checks.append(ShardCheck(folder / entry["name"], entry, decode, listed, len(manifest["label_names"])))
        first = last
    return Plan(str(folder), "images", manifest["bytes"], problems, checks)


@dataclass(frozen=True)
class ShardCheck:
    """The check of one shard; `listed` are its rows of the index, None without a usable index."""

    path: Path
    entry: dict[str, Any]
    decode: bool
    listed: dict[str, tuple[int, int, int]] | None
    num_labels: int

    def __call__(self) -> Checked:
        """Run the check; may run in another process."""
        problems: list[Problem] = []
        try:
            problems += _file_problems(self.path, self.entry)
            table = index_tar(self.path)
            problems += [self._problem(bad.key, bad.reason) for bad in table.problems]
            problems += self._sample_problems(table)
            return Checked(len(table), self.path.stat().st_size, problems)
        except (OSError, DataError) as error:
            return Checked(0, self.entry["bytes"], [*problems, self._problem("", str(error))])

    def _problem(self, sample: str, text: str) -> Problem:
        return Problem(str(self.path), sample, text)

    def _sample_problems(self, table: SampleTable) -> Iterator[Problem]:
        if len(table) != self.entry["samples"]:
            yield self._problem("", f"has {len(table)} samples, the manifest lists {self.entry['samples']}")
        found = table.rows(0, len(table))
        if self.listed is not None:
            yield from self._differences(self.listed, found)
        for key, (offset, size, label) in found.items():
            if self.num_labels and label >= self.num_labels:
                yield self._problem(key, f"label {label} is not among the {self.num_labels} label names")
            if self.decode and (reason := _decoding_error(self.path, offset, size)):
                yield self._problem(key, f"cannot be decoded: {reason}")

    def _differences(
        self, listed: dict[str, tuple[int, int, int]], found: dict[str, tuple[int, int, int]]
    ) -> Iterator[Problem]:
        for key, row in listed.items():
            if key not in found:
                yield self._problem(key, "is in the index but not in the tar")
                continue
            for field, said, actual in zip(("offset", "size", "label"), row, found[key], strict=True):
                if said != actual:
                    yield self._problem(key, f"{field} is {actual}, the index lists {said}")
        for key in found.keys() - listed.keys():
            yield self._problem(key, "is in the tar but not in the index")


def _file_problems(path: Path, entry: dict[str, Any]) -> list[Problem]:
    problem = file_problem(path, entry)
    return [Problem(str(path), "", problem)] if problem else []


def _decoding_error(path: Path, offset: int, size: int) -> str | None:
    with path.open("rb") as file:
        file.seek(offset)
        data = bytearray(file.read(size))
    try:
        decode_image(np.frombuffer(data, np.uint8), None)
    except ImageError as error:
        return str(error)
    return None
