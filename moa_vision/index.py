"""Pattern -> index: where every sample of a data set lies (shard, offset, size), as a few arrays.

The index comes from our manifest, or is built from the tar headers on first use and kept in the cache folder.
Images stay where they are; `ShardReader` reads one by its offset.
"""

import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from moa_vision import cache
from moa_vision.cache import DataError, Shard
from moa_vision.images import ImageError
from moa_vision.table import IMAGE_EXTENSIONS, BadSample, SampleTable, index_tar

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "moa-vision-shards"
MANIFEST_VERSION = 1

_ALLOWED = "allowed are a folder of shards, or tars by path, brace or glob"
_OPEN_FILES = 64  # file descriptors that a reader keeps
_THREADS = 8  # shards indexed or fetched at a time
_SHARD_NAME = re.compile(r"\.(tar|tgz)\b", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A data set: its shards in order, and the samples of each.

    Attributes:
        shards: S of them.
        starts: (S + 1,) int64; the samples of shard s are starts[s] .. starts[s + 1] - 1.
        table: the rows of all N samples, in the order of the shards.
        label_names: of the labels 0, 1, ...; empty if unknown.
        problems: what was wrong with samples when the index was built; those without an image are not in the table.
        cache_dir: where remote and compressed shards are kept.
    """

    shards: tuple[Shard, ...]
    starts: np.ndarray
    table: SampleTable
    label_names: tuple[str, ...]
    problems: tuple[BadSample, ...]
    cache_dir: Path

    def __len__(self) -> int:
        return len(self.table)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def bad(self, sample: int, reason: object) -> BadSample:
        """Names a sample that could not be used."""
        return BadSample(self.shards[self.shard_of(sample)].url, self.table.key(sample), str(reason))


class ShardReader:
    """Reads encoded images by offset; keeps the last shards' files open, each process its own."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor
        self._lost: dict[int, DataError] = {}  # shards that could not be fetched; not tried again for every sample

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, (size,) uint8.

        Raises:
            ImageError: if the shard is shorter than the index says.
            OSError, DataError: if the shard cannot be read or fetched.
        """
        table, file = self.index.table, self._file(self.index.shard_of(sample))
        data = bytearray(int(table.sizes[sample]))  # writable, so that torch takes it without a copy
        if os.preadv(file, [data], int(table.offsets[sample])) != len(data):
            raise ImageError("the shard ends before the sample does")
        return np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, shard: int) -> int:
        if shard in self._lost:
            raise self._lost[shard]
        if shard not in self._files:
            try:
                path = cache.local_path(self.index.shards[shard], self.index.cache_dir)
            except DataError as error:
                self._lost[shard] = error
                raise
            self._files[shard] = os.open(path, os.O_RDONLY)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        if "_files" in self.__dict__:  # else it was never finished
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_files": OrderedDict(), "_lost": {}}


def open_index(pattern: str, cache_dir: str | Path | None = None) -> ShardIndex:
    """Resolves `pattern` and indexes its shards.

    Args:
        pattern: a folder (our manifest in it, or all its tars), a manifest, or tars named by path, brace, glob,
            http(s)://, hf:// or pipe:command; several joined by "::". A remote name without ".tar" is a folder that
            holds our manifest. Tars may be compressed by gzip.
        cache_dir: for the indices that are built, and for remote and compressed shards; see `default_cache_dir`.

    Raises:
        ValueError: if the pattern names nothing.
        DataError: if a shard or manifest is missing, damaged or does not fit.
    """
    folder = cache.default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    sources = [read_manifest(name, folder) if name.endswith(MANIFEST) else Shard(name) for name in expand(pattern)]
    plain = [source for source in sources if isinstance(source, Shard)]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = pool.map(lambda shard: _shard_table(shard, folder), plain)
        built = iter(list(tqdm(tables, "indexing shards", len(plain), leave=False, disable=None if plain else True)))
    shards: list[Shard] = []
    columns: list[SampleTable] = []
    problems: list[BadSample] = []
    counts = [0]
    names: tuple[str, ...] = ()
    for source in sources:
        if isinstance(source, Shard):
            table, found = next(built)
            shards.append(source)
            counts.append(len(table))
            problems += found
        else:
            table = source.table
            shards += source.shards
            counts += source.counts
            names = names or source.label_names
        columns.append(table)
    urls = [shard.url for shard in shards]
    if len(set(urls)) < len(urls):
        raise ValueError(f"shard {max(urls, key=urls.count)} is named twice by {pattern!r}; name each once")
    if not sum(counts):
        raise DataError(f"{pattern!r} holds no sample with an image ({', '.join(IMAGE_EXTENSIONS)})")
    if problems:
        log.warning("%d problems in the shards of %s, the first: %s", len(problems), pattern, problems[0])
    table = SampleTable.concatenate(columns)
    return ShardIndex(tuple(shards), np.cumsum(counts, dtype=np.int64), table, names, tuple(problems), folder)


def expand(pattern: str) -> list[str]:
    """The manifests and shards that a pattern names, in order (`open_index`). Raises ValueError if there are none."""
    names: list[str] = []
    for part in expand_urls(pattern):  # "::" and braces, as webdataset reads them
        if part.startswith("pipe:"):
            names.append(part)
        elif part.startswith("file:") or not cache.is_remote(part):
            names += _expand_local(re.sub(r"^file:(//)?", "", part))
        elif "*" in part and not part.startswith(("http://", "https://")):
            fs, path = cache.filesystem(part)
            scheme = part.split("://")[0]
            names += [f"{scheme}://{found}" for found in sorted(fs.glob(path))]
        elif _SHARD_NAME.search(part.rsplit("/", 1)[-1]) or part.endswith(MANIFEST):
            names.append(part)
        else:
            names.append(f"{part.rstrip('/')}/{MANIFEST}")
    if not names:
        raise ValueError(f"{pattern!r} names no shard: {_ALLOWED}")
    return names


def _expand_local(part: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_dir():
        if (path / MANIFEST).exists():
            return [str(path / MANIFEST)]
        found = sorted(str(child) for child in path.iterdir() if re.search(r"\.(tar|tar\.gz|tgz)$", child.name))
        if not found:
            below = [child.name for child in path.iterdir() if (child / MANIFEST).exists()]
            hint = f"; did you mean one of its folders {', '.join(sorted(below))}?" if below else ""
            raise ValueError(f"folder {part!r} holds no {MANIFEST} and no .tar, .tar.gz or .tgz file{hint}")
        return found
    if has_magic(str(path)):
        return sorted(glob(str(path), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not path.exists():
        raise ValueError(f"{part!r} does not exist: {_ALLOWED}")
    return [str(path)]


class Listed(NamedTuple):
    """What a manifest lists: S shards, their S numbers of samples, the rows of all, the labels' names."""

    shards: tuple[Shard, ...]
    counts: tuple[int, ...]
    table: SampleTable
    label_names: tuple[str, ...]


def read_manifest(url: str, cache_dir: Path) -> Listed:
    """Reads a manifest of `scripts/make_shards.py`, local or remote, and the index that lies beside it.

    The names in it are plain file names beside the manifest: it can name no command, folder or other host.

    Raises:
        DataError: if it is not such a manifest, or what lies beside it does not fit.
    """
    remote = cache.is_remote(url)
    base = url.rsplit("/", 1)[0] if remote else str(Path(url).parent)
    try:
        manifest = parse_manifest(cache.read_remote(url) if remote else Path(url).read_bytes())
        shards = tuple(Shard(f"{base}/{s['name']}", s["size"], s["sha256"]) for s in manifest["shards"])
        index = manifest["index"]
        path = Path(base) / index["name"]
        if remote:
            source = Shard(f"{base}/{index['name']}", index["size"], index["sha256"])
            path = cache.fetch(source, cache_dir / "index" / f"{index['sha256']}.safetensors")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != index["sha256"]:
            raise ValueError(f"{path} is not the index it was written with")
        table, _ = SampleTable.from_bytes(data)
        counts = tuple(s["samples"] for s in manifest["shards"])
        if sum(counts) != len(table):
            raise ValueError(f"it counts {sum(counts)} samples, its index {len(table)}")
        space = np.repeat([s["size"] for s in manifest["shards"]], counts)
        if (table.offsets < 0).any() or (table.offsets > space - table.sizes).any():
            raise ValueError("its index places samples outside their shards")
        for shard in () if remote else shards:
            if Path(shard.url).stat().st_size != shard.size:
                raise ValueError(f"{shard.url} has not the {shard.size} bytes it should have")
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {url}: {error}; make or fetch the data set again") from error
    return Listed(shards, counts, table, tuple(manifest["label_names"]))


def parse_manifest(text: bytes) -> dict[str, Any]:
    """A manifest's JSON with the fields that reading needs. Raises ValueError naming the field that is wrong."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f'field "format" is not "{MANIFEST_FORMAT}"')
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(f"version {manifest.get('version')!r}, this program reads {MANIFEST_VERSION}")
    names = manifest.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('field "label_names" is no list of texts')
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        raise ValueError('field "shards" is no list')
    for entry in [*shards, manifest.get("index")]:
        if not isinstance(entry, dict):
            raise ValueError(f"a file's entry is {entry!r}")
        if not re.fullmatch(r"\w[\w.-]*", str(entry.get("name"))):
            raise ValueError(f'field "name" is {entry.get("name")!r}, not a plain file name')
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))):
            raise ValueError(f'field "sha256" of {entry["name"]} is {entry.get("sha256")!r}')
        for field in ("size",) if entry is manifest["index"] else ("size", "samples"):
            if not isinstance(entry.get(field), int) or entry[field] < 0:
                raise ValueError(f'field "{field}" of {entry["name"]} is {entry.get(field)!r}')
    return manifest


def _shard_table(shard: Shard, cache_dir: Path) -> tuple[SampleTable, list[BadSample]]:
    """A shard's rows from the index kept in the cache, or from its headers (and then kept).

    A kept index belongs to a local shard's path, size and time of change, or to a remote shard's address, whose
    content is taken to stay the same for as long as the cache is kept.
    """
    identity: tuple[object, ...] = (shard.url,)
    fetched: list[tuple[SampleTable, list[BadSample]]] = []
    try:
        if not cache.is_remote(shard.url):
            stat = Path(shard.url).stat()
            identity = (Path(shard.url).resolve(), stat.st_size, stat.st_mtime_ns)
        kept = cache_dir / "index" / f"{cache.short_hash(*identity)}.safetensors"
        try:
            return SampleTable.from_bytes(kept.read_bytes())
        except (OSError, ValueError):  # absent, or not whole: built (again)
            path = cache.local_path(shard, cache_dir, check=lambda new: fetched.append(index_tar(new, shard.url)))
    except OSError as error:
        raise DataError(f"cannot read shard {shard.url}: {error}") from error
    table, problems = fetched[-1] if fetched else index_tar(path, shard.url)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
        temporary.write_bytes(table.to_bytes(problems))
        temporary.replace(kept)
    except OSError as error:
        log.warning("the index of %s cannot be kept in %s: %s", shard.url, cache_dir, error)
    return table, problems
