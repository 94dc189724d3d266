"""The index of a data set: where every sample lies (shard, offset, size), as a few arrays.

The index comes from a manifest of scripts/make_shards.py, or is built from the tar headers on first use and cached.
`ShardReader` reads an encoded image by its offset.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from glob import glob, has_magic
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np

from moa_train.errors import ConfigError, DataError
from moa_train.manifest import MANIFEST, check_entry, parse_manifest
from moa_train.open_files import OpenFiles
from moa_train.progress import CountBar
from moa_vision import cache
from moa_vision.cache import LostShard, Shard, ShardCache, release
from moa_vision.images import ImageError
from moa_vision.table import IMAGE_EXTENSIONS, BadSample, SampleTable, index_tar

log = logging.getLogger(__name__)

FORMAT = "moa-images-2"
"""Format of manifests of image shards."""

COUNTS = ("samples", "bytes")
"""Counts of every shard's entry, whose sums the manifest has."""

_OPEN_FILES = 64
_THREADS = 8
_ALLOWED = "give a folder, or tars by path, brace or glob"
_SHARD_NAME = re.compile(r"\.tar\b", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A data set: its shards in order, and the samples of each.

    Attributes:
        shards: S shards.
        starts: (S + 1,) int64; the samples of shard s are starts[s] .. starts[s + 1] - 1.
        table: Rows of all N samples in the order of the shards.
        label_names: Names of the labels 0, 1, ...; empty if unknown.
        cache: Storage of remote shards.
    """

    shards: tuple[Shard, ...]
    starts: np.ndarray
    table: SampleTable
    label_names: tuple[str, ...]
    cache: ShardCache

    def __len__(self) -> int:
        return len(self.table)

    def identity(self) -> dict[str, str]:
        """Return checksums that identify the samples and their order, independent of their location.

        "samples" covers names and sizes; "shards" covers the bytes, if manifests give the SHA-256 of every shard.
        """
        digest = hashlib.sha256("\n".join(self.shard_names).encode(errors="replace"))
        for column in (self.table.key_bytes, self.table.key_ends, self.table.sizes, self.starts):
            digest.update(np.ascontiguousarray(column).data)
        checksums = [shard.sha256 for shard in self.shards if shard.sha256]
        if len(checksums) < len(self.shards):
            return {"samples": digest.hexdigest()}
        return {"samples": digest.hexdigest(), "shards": hashlib.sha256("".join(checksums).encode()).hexdigest()}

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        """Short unique names of the shards; see `short_names`."""
        return short_names([shard.url for shard in self.shards])

    def name(self, sample: int) -> str:
        """Return the name of a sample, SHARD/KEY; keys alone need not be unique."""
        return f"{self.shard_names[self.shard_of(sample)]}/{self.table.key(sample)}"

    def shard_of(self, sample: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def without_image(self) -> list[BadSample]:
        """Return the problems that are samples missing from the table."""
        if not self.table.problems:
            return []
        listed = {self.bad(sample, "")[:2] for sample in range(len(self))}
        return [problem for problem in self.table.problems if problem[:2] not in listed]

    def bad(self, sample: int, reason: object) -> BadSample:
        """Return the record of a sample that could not be used."""
        return BadSample(self.shards[self.shard_of(sample)].url, self.table.key(sample), str(reason))


class ShardReader:
    """A reader of encoded images; every process has its own `open_files` open files.

    A lost shard may have `max_lost` samples, or any number (None).
    """

    def __init__(self, index: ShardIndex, max_lost: int | None = None, open_files: int = _OPEN_FILES) -> None:
        self.index = index
        self.max_lost = max_lost
        self._files = OpenFiles(open_files, release)

    def read(self, sample: int) -> np.ndarray:
        """Return the encoded image, (size,) uint8.

        Raises:
            ImageError: The shard is shorter than its index.
            OSError, LostShard: The shard cannot be read or fetched.
            DataError: A lost shard has more than `max_lost` samples, or the cache cannot be written.
        """
        number = self.index.shard_of(sample)
        return self._files.read(number, lambda: self._open(number), lambda file: self._read(file, sample))

    def _open(self, number: int) -> int:
        shard = self.index.shards[number]
        try:
            return self.index.cache.open(shard)
        except LostShard as error:
            samples = int(self.index.starts[number + 1] - self.index.starts[number])
            if self.max_lost is None or samples <= self.max_lost:
                raise
            raise DataError(
                f"shard {shard.url} with {samples:,} samples is unavailable, more than data.max_bad_samples = "
                f"{self.max_lost} allows: {error}. Restore it or raise the limit, then run the command again."
            ) from error

    def _read(self, file: int, sample: int) -> np.ndarray:
        offset, size = int(self.index.table.offsets[sample]), int(self.index.table.sizes[sample])
        data = bytearray(size)  # writable, so that torch uses it without a copy
        if os.preadv(file, [data], offset) != size:
            raise ImageError("the shard ends before the sample does")
        return np.frombuffer(data, np.uint8)


def open_index(
    pattern: str,
    cache_dir: str | Path | None = None,
    cache_gib: float | None = None,
    image_key: str | None = None,
) -> ShardIndex:
    """Resolve a pattern and index its shards.

    Args:
        pattern: A folder (with a manifest or tars), a manifest, or tars named by path, brace, glob, http(s)://, hf://
            or pipe:command; several joined by "::". A remote name without ".tar" is a folder with a manifest.
        cache_dir: Folder for new indices and for remote shards; None: `default_cache_dir`.
        cache_gib: Limit of the shards kept there in GiB; the least recently used are evicted. None: no limit.
        image_key: Member that is the image, as in `moa_vision.table.image_member`; ignored for manifests.

    Raises:
        ConfigError: The pattern names nothing, or a shard twice.
        DataError: A shard or manifest is missing, damaged or inconsistent.
    """
    folder = cache.default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    shard_cache = ShardCache(folder, None if cache_gib is None else int(cache_gib * 2**30))
    names = expand(pattern)
    parts: list[ShardIndex] = []
    with ThreadPoolExecutor(_THREADS) as pool, CountBar(total=len(names), title="indexing", unit="shard") as bar:
        for part in pool.map(partial(_open_part, shard_cache=shard_cache, image_key=image_key), names):
            parts.append(part)
            bar.update()
    index = ShardIndex(
        shards=tuple(shard for part in parts for shard in part.shards),
        starts=np.cumsum([0, *(count for part in parts for count in np.diff(part.starts))], dtype=np.int64),
        table=SampleTable.concatenate([part.table for part in parts]),
        label_names=next((part.label_names for part in parts if part.label_names), ()),
        cache=shard_cache,
    )
    _check_index(pattern, index)
    return index


def _check_index(pattern: str, index: ShardIndex) -> None:
    urls, problems = [shard.url for shard in index.shards], index.table.problems
    if len(set(urls)) < len(urls):
        raise ConfigError(f"{pattern!r} names shard {max(urls, key=urls.count)} twice; name each shard once")
    first = f"the first: {problems[0].key} in {problems[0].shard}: {problems[0].reason}" if problems else "it is empty"
    if not len(index):
        raise DataError(f"{pattern!r} has no sample with an image ({', '.join(IMAGE_EXTENSIONS)}); {first}")
    if problems:
        log.warning("%d problems in the shards of %s, %s", len(problems), pattern, first)


def _open_part(url: str, shard_cache: ShardCache, image_key: str | None) -> ShardIndex:
    """Return the index of a manifest or of a tar without one."""
    if url.endswith(MANIFEST):
        return _open_manifest(url, shard_cache)
    table = _shard_table(Shard(url), shard_cache, image_key)
    return ShardIndex((Shard(url),), np.array([0, len(table)]), table, (), shard_cache)


def load_manifest(url: str) -> dict[str, Any]:
    """Read and validate a manifest of scripts/make_shards.py; raise DataError that names the invalid field."""
    try:
        content = cache.read_remote(url) if cache.is_remote(url) else Path(url).read_bytes()
        manifest = parse_manifest(content, FORMAT, COUNTS)
        check_entry(manifest.get("index"))
        names = manifest.get("label_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"label_names is {names!r}, expected a list of names")
    except (OSError, DataError) as error:
        raise DataError(f"manifest {url}: {error}; pack or copy the data set again") from error
    return manifest


def manifest_shard(url: str, entry: dict[str, Any]) -> Shard:
    """Return the file of an entry of the manifest at `url`."""
    base = url.rpartition("/")[0] or "."
    return Shard(f"{base}/{entry['name']}", entry["bytes"], entry["sha256"])


def _open_manifest(url: str, shard_cache: ShardCache) -> ShardIndex:
    """Read a manifest, its index, and the sizes of its local shards."""
    manifest = load_manifest(url)
    entries = manifest["shards"]
    shards = tuple(manifest_shard(url, entry) for entry in entries)
    index = manifest_shard(url, manifest["index"])
    try:
        with os.fdopen(shard_cache.open(index), "rb") as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != index.sha256:
            raise DataError(f"SHA-256 of {index.url} differs from the manifest")
        table = SampleTable.from_bytes(content)
        counts = [entry["samples"] for entry in entries]
        if sum(counts) != len(table):
            raise DataError(f"it lists {sum(counts)} samples, its index {len(table)}")
        if (table.offsets > np.repeat([entry["bytes"] for entry in entries], counts) - table.sizes).any():
            raise DataError("its index has samples outside their shards")
        if not cache.is_remote(url):
            for shard in shards:
                if (size := Path(shard.url).stat().st_size) != shard.bytes:
                    raise DataError(f"{shard.url} has {size} bytes, the manifest lists {shard.bytes}")
    except (OSError, DataError) as error:
        raise DataError(f"manifest {url}: {error}; pack or copy the data set again") from error
    return ShardIndex(shards, np.cumsum([0, *counts]), table, tuple(manifest["label_names"]), shard_cache)


def _shard_table(shard: Shard, shard_cache: ShardCache, image_key: str | None) -> SampleTable:
    """Return the table of a shard from the index cached for its URL or path, size and time, or from its headers."""
    identity: tuple[object, ...] = (shard.url,)
    try:
        if not cache.is_remote(shard.url):
            stat = Path(shard.url).stat()
            identity = (Path(shard.url).resolve(), stat.st_size, stat.st_mtime_ns)
        cached = shard_cache.folder / "index" / f"{cache.short_hash(*identity, image_key)}.safetensors"
        with suppress(OSError, DataError):  # absent or damaged
            return SampleTable.from_bytes(cached.read_bytes())
        file = shard_cache.open(shard)
        try:
            table = index_tar(shard_cache.path(shard), shard.url, image_key)
        except DataError:
            if cache.is_remote(shard.url):  # the transfer may have been cut; the next run fetches it again
                shard_cache.path(shard).unlink(missing_ok=True)
            raise
        finally:
            release(file)
    except OSError as error:
        raise DataError(f"cannot read shard {shard.url}: {error}") from error
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f"{cached.name}.{os.getpid()}.{get_ident()}.tmp")
    temporary.write_bytes(table.to_bytes())
    temporary.replace(cached)
    return table


def expand(pattern: str) -> list[str]:
    """Return the manifests and shards that a pattern names, in order; see `open_index`. Raises ConfigError if none."""
    from webdataset.shardlists import expand_urls  # late: training steps need no webdataset

    names: list[str] = []
    for part in expand_urls(pattern):  # "::" and braces, as in webdataset
        if part.startswith("pipe:"):
            names.append(part)
        elif part.startswith("file:") or not cache.is_remote(part):
            local = _expand_local(re.sub(r"^file:(//)?", "", part))
            names += [f"./{name}" if cache.is_remote(name) else name for name in local]  # a file named "pipe:..."
        elif "*" in part and not part.startswith(("http://", "https://")):
            fs, path = cache.filesystem(part)
            scheme = part.split("://")[0]
            names += [f"{scheme}://{found}" for found in sorted(fs.glob(path))]
        elif _SHARD_NAME.search(part.rsplit("/", 1)[-1]) or part.endswith(MANIFEST):
            names.append(part)
        else:
            names.append(f"{part.rstrip('/')}/{MANIFEST}")
    if not names:
        raise ConfigError(f"{pattern!r} matches no shard; {_ALLOWED}")
    return names


def short_names(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the file names of shards without ".tar", with as many parent folders as make them unique.

    URLs that differ only elsewhere, such as in a query, stay whole.
    """
    plain = [url.split("?")[0] if cache.is_remote(url) else url for url in urls]
    paths = [re.sub(r"\.tar\b[^/]*$", "", url, flags=re.IGNORECASE).split("/") for url in plain]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = tuple("/".join(path[-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(urls)


def _expand_local(part: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_dir():
        return _expand_folder(path)
    if not has_magic(str(path)) and not path.exists():
        raise ConfigError(f"{part!r} does not exist; {_ALLOWED}")
    return sorted(glob(str(path), recursive=True))  # noqa: PTH207  (Path.glob rejects absolute patterns)


def _expand_folder(folder: Path) -> list[str]:
    if (folder / MANIFEST).exists():
        return [str(folder / MANIFEST)]
    found = sorted(str(child) for child in folder.iterdir() if child.suffix == ".tar")
    if not found:
        raise ConfigError(
            f"folder {str(folder)!r} has no {MANIFEST} and no .tar file; give a folder of shards, or pack images "
            f"first: python scripts/make_shards.py --source {folder} --out FOLDER"
        )
    return found
