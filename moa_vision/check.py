"""Checks of image shards: bytes against the manifest, tar members against the index, and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from moa_train.checks import Checked, Plan, Problem, unlisted
from moa_train.errors import DataError
from moa_train.manifest import MANIFEST, file_problem
from moa_vision import cache
from moa_vision.cache import Shard, ShardCache
from moa_vision.images import ImageError, decode_image
from moa_vision.index import load_manifest, manifest_shard
from moa_vision.table import SampleTable, index_tar


def plan_check(manifest_url: str, *, decode: bool, cache_dir: Path) -> Plan:
    """Plan the check of a data set; its manifest and index are checked at once. For the arguments see `ShardCheck`."""
    base = manifest_url.rpartition("/")[0] or "."
    try:
        manifest = load_manifest(manifest_url)
    except DataError as error:
        return Plan(base, "images", 0, [Problem(manifest_url, "", str(error))], [])
    entries, index = manifest["shards"], manifest_shard(manifest_url, manifest["index"])
    problems = [] if cache.is_remote(manifest_url) else unlisted(Path(base), [entry["name"] for entry in entries])
    table: SampleTable | None = None
    try:
        with _fetched(index, cache_dir) as path:
            problems += _file_problems(index, path)
            table = SampleTable.from_bytes(path.read_bytes())
            if len(table) != manifest["samples"]:
                raise DataError(f"has {len(table)} samples, the manifest lists {manifest['samples']}")
    except (OSError, DataError) as error:
        problems.append(Problem(index.url, "", str(error)))
        table = None
    checks = []
    first = 0
    for entry in entries:
        last = first + entry["samples"]
        listed = None if table is None else table.rows(first, last)
        shard = manifest_shard(manifest_url, entry)
        checks.append(ShardCheck(shard, cache_dir, decode, entry["samples"], listed, len(manifest["label_names"])))
        first = last
    return Plan(base, "images", manifest["bytes"], problems, checks)


def plan_tars(name: str, urls: Sequence[str], *, decode: bool, cache_dir: Path, image_key: str | None) -> Plan:
    """Plan the check of tars without a manifest: headers, members, labels and images; see `ShardCheck`."""
    size = sum(Path(url).stat().st_size for url in urls if not cache.is_remote(url))
    checks = [ShardCheck(Shard(url), cache_dir, decode, image_key=image_key) for url in urls]
    note = f"no {MANIFEST}: sizes, checksums and missing shards cannot be checked"
    return Plan(name, "images", size, [], checks, note)


@dataclass(frozen=True)
class ShardCheck:
    """The check of one shard: its bytes, its members against the index, and its images if `decode` is set.

    A remote shard is kept in a temporary folder in `cache_dir` meanwhile. `samples`, `listed` (`SampleTable.rows`) and
    `num_labels` come from the manifest and its index, if there are any; `image_key` is for tars without a manifest.
    """

    shard: Shard
    cache_dir: Path
    decode: bool
    samples: int | None = None
    listed: dict[str, tuple[int, int, int]] | None = None
    num_labels: int = 0
    image_key: str | None = None

    def __call__(self) -> Checked:
        """Run the check; may run in another process."""
        problems: list[Problem] = []
        try:
            with _fetched(self.shard, self.cache_dir) as path:
                problems += _file_problems(self.shard, path)
                table = index_tar(path, self.shard.url, self.image_key)
                problems += [self._problem(bad.key, bad.reason) for bad in table.problems]
                problems += self._sample_problems(path, table)
                return Checked(len(table), path.stat().st_size, problems)
        except (OSError, DataError) as error:
            return Checked(0, self.shard.bytes or 0, [*problems, self._problem("", str(error))])

    def _problem(self, sample: str, text: str) -> Problem:
        return Problem(self.shard.url, sample, text)

    def _sample_problems(self, path: Path, table: SampleTable) -> Iterator[Problem]:
        if self.samples is None and not len(table):
            yield self._problem("", "has no sample with an image")
        if self.samples is not None and len(table) != self.samples:
            yield self._problem("", f"has {len(table)} samples, the manifest lists {self.samples}")
        found = table.rows(0, len(table))
        if self.listed is not None:
            yield from self._differences(self.listed, found)
        for key, (offset, size, label) in found.items():
            if self.num_labels and label >= self.num_labels:
                yield self._problem(key, f"label {label} is not among the {self.num_labels} label names")
            if self.decode and (reason := _decoding_error(path, offset, size)):
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


@contextmanager
def _fetched(shard: Shard, cache_dir: Path) -> Iterator[Path]:
    """Yield the path of the plain file; a remote one is fetched and deleted afterwards."""
    if not cache.is_remote(shard.url):
        yield Path(shard.url)
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="check-", dir=cache_dir) as folder:
        yield ShardCache(Path(folder)).fetch(shard)


def _file_problems(shard: Shard, path: Path) -> list[Problem]:
    """Return how a file differs from its manifest entry; a fetched one was verified by the cache."""
    if shard.sha256 is None or cache.is_remote(shard.url):
        return []
    problem = file_problem(path, shard._asdict())
    return [Problem(shard.url, "", problem)] if problem else []


def _decoding_error(path: Path, offset: int, size: int) -> str | None:
    with path.open("rb") as file:
        file.seek(offset)
        data = bytearray(file.read(size))
    try:
        decode_image(np.frombuffer(data, np.uint8), None)
    except ImageError as error:
        return str(error)
    return None
