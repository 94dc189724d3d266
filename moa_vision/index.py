"""Pattern -> index: where every sample of a data set lies (shard, offset, size), as a few arrays.

The index comes from our manifest, or is built from the tar headers on first use and kept in the cache folder.
Images stay where they are; `ShardReader` reads one by its offset.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.shardlists import expand_urls

from moa_train.errors import DataError
from moa_train.open_files import OpenFiles
from moa_train.progress import CountBar
from moa_vision import cache
from moa_vision.cache import LostShard, Shard
from moa_vision.images import ImageError
from moa_vision.table import IMAGE_EXTENSIONS, BadSample, SampleTable, index_tar

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "moa-vision-shards"
MANIFEST_VERSION = 1

_ALLOWED = "allowed are a folder of shards, or tars by path, brace or glob"
_PACK = "pack images first: python scripts/make_shards.py --source {} --out FOLDER"
_OPEN_FILES = 64  # file descriptors that a reader keeps
_MAX_SIZE = 2**62  # bytes; a larger one, or as many samples, is a mistake
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
        cache_limit: how many bytes of them at a time; None: all.
        opened_s: `time.time()` at which it was opened; shards that were lost before are tried again.
    """

    shards: tuple[Shard, ...]
    starts: np.ndarray
    table: SampleTable
    label_names: tuple[str, ...]
    problems: tuple[BadSample, ...]
    cache_dir: Path
    cache_limit: int | None = None
    opened_s: float = field(default_factory=time.time)

    def __len__(self) -> int:
        return len(self.table)

    def identity(self) -> dict[str, str]:
        """Checksums that tell these samples, in this order, from others, wherever they lie.

        Of their names and sizes, and of the shards' bytes where manifests say what those are.
        """
        digest = hashlib.sha256("\n".join(self.shard_names).encode(errors="replace"))
        for column in (self.table.key_bytes, self.table.key_ends, self.table.sizes, self.starts):
            digest.update(np.ascontiguousarray(column).data)
        found = {"samples": digest.hexdigest()}
        sums = [shard.sha256 for shard in self.shards if shard.sha256]
        whole = len(sums) == len(self.shards)
        return found | ({"shards": hashlib.sha256("".join(sums).encode()).hexdigest()} if whole else {})

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        """Short names of the shards; see `short_names`."""
        return short_names([shard.url for shard in self.shards])

    def name(self, sample: int) -> str:
        """The identity of a sample, SHARD/KEY: other shards may hold the same key."""
        return f"{self.shard_names[self.shard_of(sample)]}/{self.table.key(sample)}"

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def shard_bytes(self) -> list[int]:
        """The size of each shard, as its manifest says, or at least that of its samples."""
        return [shard.size or self.end_of(number) for number, shard in enumerate(self.shards)]

    def end_of(self, number: int) -> int:
        """Where the last sample of shard `number` ends, in bytes of its plain tar."""
        span = slice(self.starts[number], self.starts[number + 1])
        return int((self.table.offsets[span] + self.table.sizes[span]).max(initial=0))

    def without_image(self) -> list[BadSample]:
        """The samples and images of the shards that are not in the table."""
        keys = {(self.bad(i, "").shard, self.table.key(i)) for i in range(len(self))} if self.problems else set()
        return [problem for problem in self.problems if (problem.shard, problem.key) not in keys]

    def bad(self, sample: int, reason: object) -> BadSample:
        """Names a sample that could not be used."""
        return BadSample(self.shards[self.shard_of(sample)].url, self.table.key(sample), str(reason))


class ShardReader:
    """Reads encoded images by offset; keeps the last shards' files open, each process its own.

    Args:
        index: of the samples.
        max_lost: the most samples of a shard that can be done without; None: any number.
        open_files: how many files are kept open.
    """

    def __init__(self, index: ShardIndex, max_lost: int | None = None, open_files: int | None = None) -> None:
        self.index = index
        self.max_lost = max_lost
        self._files = OpenFiles(open_files or _OPEN_FILES, cache.release)
        self._lost: dict[int, tuple[LostShard, float]] = {}  # and when that was: not tried for every sample

    def read(self, sample: int) -> np.ndarray:
        """The encoded image, (size,) uint8.

        Raises:
            ImageError: if the shard is shorter than the index says.
            OSError, LostShard: if the shard cannot be read (twice) or fetched.
            DataError: if such a shard has more than `max_lost` samples, or the cache has no room for it.
        """
        number = self.index.shard_of(sample)
        return self._files.read(number, lambda: self._open(number), lambda file: self._read(file, sample))

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        self._files.close()

    def _read(self, file: int, sample: int) -> np.ndarray:
        offset, size = int(self.index.table.offsets[sample]), int(self.index.table.sizes[sample])
        if offset + size > os.fstat(file).st_size:  # before so much memory is taken
            raise ImageError("the shard ends before the sample does")
        data = bytearray(size)  # writable, so that torch takes it without a copy
        if os.preadv(file, [data], offset) != size:
            raise ImageError("the shard ends before the sample does")
        return np.frombuffer(data, np.uint8)

    def _open(self, number: int) -> int:
        index, shard = self.index, self.index.shards[number]
        error, lost_s = self._lost.get(number, (None, 0.0))
        if error is not None and time.monotonic() - lost_s < cache.LOST_S:
            raise error
        try:
            opened = cache.open_shard(
                shard,
                index.cache_dir,
                limit=index.cache_limit,
                since_s=index.opened_s,
                least=index.end_of(number),
            )
        except LostShard as error:
            self._lost[number] = error, time.monotonic()
            samples = int(index.starts[number + 1] - index.starts[number])
            if self.max_lost is not None and samples > self.max_lost:
                raise DataError(
                    f"shard {shard.url} with its {samples:,} samples is lost, and data.max_bad_samples is "
                    f"{self.max_lost}: {error}. Bring it back and run the same command again, or raise the limit."
                ) from error
            raise
        return opened.file


def open_index(
    pattern: str,
    cache_dir: str | Path | None = None,
    cache_gib: float | None = None,
    image_key: str | None = None,
) -> ShardIndex:
    """Resolves `pattern` and indexes its shards.

    Args:
        pattern: a folder (our manifest in it, or all its tars), a manifest, or tars named by path, brace, glob,
            http(s)://, hf:// or pipe:command; several joined by "::". A remote name without ".tar" is a folder that
            holds our manifest. Tars may be compressed by gzip.
        cache_dir: for the indices that are built, and for remote and compressed shards; see `default_cache_dir`.
        cache_gib: GiB of shards that are kept there; those that were not used for longest go. None: no limit.
        image_key: which member is the image, as in `moa_vision.table.image_member`; of no use to our manifest.

    Raises:
        ValueError: if the pattern names nothing.
        DataError: if a shard or manifest is missing, damaged or does not fit.
    """
    folder = cache.default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    limit = None if cache_gib is None else int(cache_gib * 2**30)
    sources = [read_manifest(name, folder) if name.endswith(MANIFEST) else Shard(name) for name in expand(pattern)]
    plain = [source for source in sources if isinstance(source, Shard)]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = pool.map(lambda shard: _shard_table(shard, folder, limit, image_key), plain)
        with CountBar(total=len(plain), title="indexing shards", unit="shard") as bar:
            built = iter([(bar.update(), table)[1] for table in tables])
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
        first = f"; the first, {problems[0].key} in {problems[0].shard}: {problems[0].reason}" if problems else ""
        raise DataError(f"{pattern!r} holds no sample with an image ({', '.join(IMAGE_EXTENSIONS)}){first}")
    if problems:
        log.warning("%d problems in the shards of %s, the first: %s", len(problems), pattern, problems[0])
    table = SampleTable.concatenate(columns)
    return ShardIndex(tuple(shards), np.cumsum(counts, dtype=np.int64), table, names, tuple(problems), folder, limit)


def expand(pattern: str, allowed: str = _ALLOWED) -> list[str]:
    """The manifests and shards that a pattern names, in order (`open_index`).

    Raises:
        ValueError: if there are none; the message ends in what is `allowed`.
    """
    names: list[str] = []
    for part in expand_urls(pattern):  # "::" and braces, as webdataset reads them
        if part.startswith("pipe:"):
            names.append(part)
        elif part.startswith("file:") or not cache.is_remote(part):
            local = _expand_local(re.sub(r"^file:(//)?", "", part), allowed)
            names += [f"./{name}" if cache.is_remote(name) else name for name in local]  # of a file named "pipe:..."
        elif "*" in part and not part.startswith(("http://", "https://")):
            fs, path = cache.filesystem(part)
            scheme = part.split("://")[0]
            names += [f"{scheme}://{found}" for found in sorted(fs.glob(path))]
        elif _SHARD_NAME.search(part.rsplit("/", 1)[-1]) or part.endswith(MANIFEST):
            names.append(part)
        else:
            names.append(f"{part.rstrip('/')}/{MANIFEST}")
    if not names:
        raise ValueError(f"{pattern!r} names no shard: {allowed}")
    return names


def short_names(urls: Sequence[str]) -> tuple[str, ...]:
    """The file names of shards without ".tar", with as many folders before them as tell all of them apart.

    So they stay the same when a data set is moved. Addresses that differ elsewhere only (in a query) stay whole.
    """
    plain = [url.split("?")[0] if cache.is_remote(url) else url for url in urls]
    paths = [re.sub(r"\.(tar|tgz)\b[^/]*$", "", url, flags=re.IGNORECASE).split("/") for url in plain]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = tuple("/".join(path[-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(urls)


def _expand_local(part: str, allowed: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_dir():
        if (path / MANIFEST).exists():
            return [str(path / MANIFEST)]
        found = sorted(str(child) for child in path.iterdir() if re.search(r"\.(tar|tar\.gz|tgz)$", child.name))
        if not found:
            below = [child.name for child in path.iterdir() if (child / MANIFEST).exists()]
            hint = f"; did you mean one of its folders {', '.join(sorted(below))}?" if below else ""
            if any(_is_image(file) for levels in ("*", "*/*", "*/*/*") for file in path.glob(levels)):
                hint = f"; {_PACK.format(path)}"
            raise ValueError(f"folder {part!r} holds no {MANIFEST} and no .tar, .tar.gz or .tgz file{hint}")
        return found
    if not has_magic(str(path)) and not path.exists():
        raise ValueError(f"{part!r} does not exist: {allowed}")
    found = sorted(glob(str(path), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    for image in filter(_is_image, map(Path, found)):
        raise ValueError(f"{image} is an image, no shard; {_PACK.format(image.parent)}")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower()[1:] in IMAGE_EXTENSIONS


class Listed(NamedTuple):
    """What a manifest lists: S shards, their S numbers of samples, the rows of all, the labels' names."""

    shards: tuple[Shard, ...]
    counts: tuple[int, ...]
    table: SampleTable
    label_names: tuple[str, ...]


def read_manifest(url: str, cache_dir: Path, whole: bool = False) -> Listed:
    """Reads a manifest of `scripts/make_shards.py`, local or remote, and the index that lies beside it.

    The names in it are plain file names beside the manifest: it can name no command, folder or other host. Local
    shards that are absent or cut are left to `ShardReader`, as when that befalls them later: a run can be started
    again that has put up with it. Unless they all are, or `whole` is asked for.

    Raises:
        DataError: if it is not such a manifest, or what lies beside it does not fit.
    """
    remote = cache.is_remote(url)
    base = url.rsplit("/", 1)[0] if remote else str(Path(url).parent)
    try:
        manifest = cache.read_remote(url, parse_manifest) if remote else parse_manifest(Path(url).read_bytes())
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
        sizes = {} if remote else {shard: _size(Path(shard.url)) for shard in shards}
        short = [shard for shard, size in sizes.items() if size < (shard.size or 0)]
        wrong = [shard for shard, size in sizes.items() if size != shard.size and (whole or shard not in short)]
        wrong = wrong or (short if len(short) == len(shards) else [])
        if wrong:
            raise ValueError(f"{wrong[0].url} has not the {wrong[0].size} bytes it should have")
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {url}: {error}; make or fetch the data set again") from error
    if short:
        log.warning(
            "%d of the %d shards of %s are absent or cut, the first: %s", len(short), len(shards), url, short[0].url
        )
    return Listed(shards, counts, table, tuple(manifest["label_names"]))


def _size(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def parse_manifest(text: bytes) -> dict[str, Any]:
    """A manifest's JSON with the fields that reading needs. Raises ValueError naming the field that is wrong."""
    try:
        manifest = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
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
        if not re.fullmatch(r"\w[\w.-]*", entry["name"] if isinstance(entry.get("name"), str) else ""):
            raise ValueError(f'field "name" is {entry.get("name")!r}, not a plain file name')
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"] if isinstance(entry.get("sha256"), str) else ""):
            raise ValueError(f'field "sha256" of {entry["name"]} is {entry.get("sha256")!r}')
        for key in ("size",) if entry is manifest["index"] else ("size", "samples"):
            if type(entry.get(key)) is not int or not 0 <= entry[key] <= _MAX_SIZE:
                raise ValueError(f'field "{key}" of {entry["name"]} is {entry.get(key)!r}')
    return manifest


def _shard_table(
    shard: Shard, cache_dir: Path, limit: int | None, image_key: str | None
) -> tuple[SampleTable, list[BadSample]]:
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
        kept = cache_dir / "index" / f"{cache.short_hash(*identity, image_key)}.safetensors"
        try:
            return SampleTable.from_bytes(kept.read_bytes())
        except (OSError, ValueError):  # absent, or not whole: built (again)
            opened = cache.open_shard(
                shard, cache_dir, lambda path: fetched.append(index_tar(path, shard.url, image_key)), limit
            )
    except OSError as error:
        raise DataError(f"cannot read shard {shard.url}: {error}") from error
    try:
        table, problems = fetched[-1] if fetched else index_tar(opened.path, shard.url, image_key)
    finally:
        opened.close()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
        temporary.write_bytes(table.to_bytes(problems))
        temporary.replace(kept)
    except OSError as error:
        log.warning("the index of %s cannot be kept in %s: %s", shard.url, cache_dir, error)
    return table, problems
