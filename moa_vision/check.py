"""Checks shards file by file and sample by sample, those of `moa_vision.shards` against their manifest and index."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from moa_train.checks import Checked, Plan, Problem, unlisted
from moa_train.errors import DataError
from moa_vision import cache
from moa_vision.cache import Shard
from moa_vision.images import ImageError, decode_image
from moa_vision.index import MANIFEST, parse_manifest
from moa_vision.table import SampleTable, index_tar

_SHOWN = 200  # characters of a reason


class Rows(NamedTuple):
    """What the index says of one shard: N keys, and (N, 3) int64 offsets, sizes and labels."""

    keys: list[str]
    numbers: np.ndarray


def plan_check(manifest_url: str, *, decode: bool = False, cache_dir: Path | None = None) -> Plan:
    """Plans the check of a data set; its manifest and its index are checked here.

    Args:
        manifest_url: of its manifest, local or remote.
        decode: decode every image too.
        cache_dir: where one remote shard at a time is while it is checked, for each process; see
            `moa_vision.cache.default_cache_dir`.
    """
    folder = cache_dir or cache.default_cache_dir()
    base = manifest_url.rpartition("/")[0] or "."
    remote = cache.is_remote(manifest_url)
    try:
        path = Path(manifest_url)
        manifest = cache.read_remote(manifest_url, parse_manifest) if remote else parse_manifest(path.read_bytes())
    except (OSError, ValueError, DataError) as error:
        return Plan(base, "images", 0, [Problem(manifest_url, "", str(error))], [])
    index, entries = manifest["index"], manifest["shards"]
    url = f"{base}/{index['name']}"
    table: SampleTable | None = None
    problems: list[Problem] = []
    try:
        with _at_hand(url, index, folder) as path:
            content = path.read_bytes()
            problems += _bytes_differ(url, path, index)
            table, _ = SampleTable.from_bytes(content)
    except (OSError, ValueError, DataError) as error:
        problems.append(Problem(url, "", str(error)))
    names = [entry["name"] for entry in entries]
    problems += [
        Problem(manifest_url, name, "is listed twice") for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    problems += [] if remote else unlisted(Path(base), names)
    samples, size = (sum(entry[key] for entry in entries) for key in ("samples", "size"))
    problems += [
        Problem(manifest_url, "", f'"{key}" is {manifest.get(key)!r}, its shards come to {total}')
        for key, total in (("samples", samples), ("bytes", size))
        if manifest.get(key) != total
    ]
    if table is not None and len(table) != samples:
        problems.append(Problem(url, "", f"has {len(table)} samples, the manifest {samples}"))
        table = None
    labels = len(manifest["label_names"])
    checks = []
    first = 0
    for entry in entries:
        rows = None if table is None else _rows(table, range(first, first + entry["samples"]))
        first += entry["samples"]
        checks.append(partial(check_shard, f"{base}/{entry['name']}", entry, rows, labels, decode, folder))
    return Plan(base, "images", size, problems, checks)


def plan_tars(
    name: str,
    urls: Sequence[str],
    *,
    decode: bool = False,
    cache_dir: Path | None = None,
    image_key: str | None = None,
) -> Plan:
    """Plans the check of tars that no manifest lists: their headers, members, labels and images.

    Args:
        name: of the set.
        urls: of the tars, local or remote.
        decode: decode every image too.
        cache_dir: see `plan_check`.
        image_key: see `moa_vision.table.image_member`.
    """
    folder = cache_dir or cache.default_cache_dir()
    size = sum(Path(url).stat().st_size for url in urls if not cache.is_remote(url))
    checks = [partial(check_shard, url, None, None, 0, decode, folder, image_key) for url in urls]
    note = f"no {MANIFEST}: sizes, checksums and missing shards cannot be checked"
    return Plan(name, "images", size, [], checks, note)


def check_shard(
    url: str,
    entry: dict[str, Any] | None,
    rows: Rows | None,
    labels: int,
    decode: bool,
    cache_dir: Path,
    image_key: str | None = None,
) -> Checked:
    """Checks one shard: its bytes, its members against its part of the index, and its images.

    Args:
        url: of the tar.
        entry: what the manifest says of it; None: there is no manifest.
        rows: what the index says of it; None: the index cannot be used.
        labels: number of label names; 0: unknown.
        decode: decode the images.
        cache_dir: a remote or compressed shard is kept in a folder there while it is checked.
        image_key: see `moa_vision.table.image_member`.
    """
    problems: list[Problem] = []
    try:
        with _at_hand(url, entry, cache_dir) as path:
            return _check_file(url, path, entry, rows, labels, decode, problems, image_key)
    except (OSError, DataError) as error:
        return Checked(0, entry["size"] if entry else 0, [*problems, Problem(url, "", str(error)[:_SHOWN])])


@contextmanager
def _at_hand(url: str, entry: dict[str, Any] | None, cache_dir: Path) -> Iterator[Path]:
    """The plain file of an entry; a remote one as its server has it now, for as long as it is needed."""
    if not cache.is_kept(url):
        yield Path(url)
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="check-", dir=cache_dir) as folder:
        shard = Shard(url, entry["size"], entry["sha256"]) if entry else Shard(url)
        yield cache.local_path(shard, Path(folder))


def _check_file(
    url: str,
    path: Path,
    entry: dict[str, Any] | None,
    rows: Rows | None,
    labels: int,
    decode: bool,
    problems: list[Problem],
    image_key: str | None,
) -> Checked:
    """Adds what is wrong with a shard's file to `problems`; see `check_shard`."""
    size = path.stat().st_size
    problems += _bytes_differ(url, path, entry) if entry else []
    table, found = index_tar(path, url, image_key)
    problems += [Problem(url, bad.key, bad.reason) for bad in found]
    if entry is None and not len(table):
        problems.append(Problem(url, "", "holds no sample with an image"))
    if entry and len(table) != entry["samples"]:
        problems.append(Problem(url, "", f"has {len(table)} samples, the manifest {entry['samples']}"))
    actual = _rows(table, range(len(table)))
    problems += [] if rows is None else _rows_differ(url, rows, actual)
    if labels:
        outside = (key for key, row in zip(*actual, strict=True) if row[2] >= labels)
        problems += [Problem(url, key, f"its label is not among the {labels} label names") for key in outside]
    if decode:
        problems += _undecodable(url, path, actual)
    return Checked(len(table), size, problems)


def _bytes_differ(url: str, path: Path, entry: dict[str, Any]) -> list[Problem]:
    size = path.stat().st_size
    if size != entry["size"]:
        return [Problem(url, "", f"has {size} bytes, the manifest says {entry['size']}")]
    if cache.file_sha256(path) != entry["sha256"]:
        return [Problem(url, "", "its SHA-256 is not the manifest's")]
    return []


def _rows(table: SampleTable, part: range) -> Rows:
    span = slice(part.start, part.stop)
    numbers = np.stack([table.offsets[span], table.sizes[span], table.labels[span].astype(np.int64)], axis=1)
    return Rows([table.key(sample) for sample in part], numbers)


def _rows_differ(url: str, said: Rows, found: Rows) -> Iterator[Problem]:
    """Where the index and the tar say different things of a sample."""
    here = {key: row.tolist() for key, row in zip(*found, strict=True)}
    for key, row in zip(said.keys, said.numbers.tolist(), strict=True):
        actual = here.pop(key, None)
        if actual is None:
            yield Problem(url, key, "the index lists it, the tar lacks it")
        for what, ours, theirs in zip(("offset", "size", "label"), row, actual or row, strict=True):
            if ours != theirs:
                yield Problem(url, key, f"its {what} is {theirs}, the index says {ours}")
    for key in here:
        yield Problem(url, key, "the index does not list it")


def _undecodable(url: str, path: Path, rows: Rows) -> Iterator[Problem]:
    with path.open("rb") as file:
        for key, (offset, size, _) in zip(rows.keys, rows.numbers.tolist(), strict=True):
            file.seek(offset)
            try:
                decode_image(np.frombuffer(bytearray(file.read(size)), np.uint8), None)
            except ImageError as error:
                yield Problem(url, key, f"cannot be decoded: {str(error)[:_SHOWN]}")
