"""Shards as plain local tars: remote ones are fetched and compressed ones unpacked into a bounded, shared cache."""

from __future__ import annotations

import errno
import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock

from moa_train.atomic_io import sync_file
from moa_train.errors import ConfigError, DataError
from moa_train.manifest import file_problem
from moa_vision.cache_eviction import hold, make_room, release

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 6
"""Attempts to fetch a shard."""

BACKOFF_S = 2.0
"""Pause after the first failed attempt; doubled after each."""

STALL_S = 30.0
"""Time without a byte after which an HTTP transfer fails."""

RETRY_LIMIT_S = ATTEMPTS * STALL_S + BACKOFF_S * (2 ** (ATTEMPTS - 1) - 1)
"""Longest time that attempts of a shard wait, not counting the time in which bytes arrive."""

LOST_S = 600.0
"""Time after which an unavailable shard is tried again."""

_PERMANENT_STATUS = (401, 403, 404, 410)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class LostShard(DataError):
    """A shard that is unavailable after all retries."""


class Shard(NamedTuple):
    """The location of a shard and, from its manifest, the size in bytes and SHA-256 of the file as transferred."""

    url: str
    bytes: int | None = None
    sha256: str | None = None


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/moa_vision`, by default `~/.cache/moa_vision`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moa_vision"


def is_remote(url: str) -> bool:
    """Return whether `url` is `scheme://...` or `pipe:command` rather than a path."""
    return url.startswith("pipe:") or bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url))


def is_cached(url: str) -> bool:
    """Return whether a shard is read from a copy in the cache: it is remote, or compressed by its suffix."""
    return is_remote(url) or url.endswith((".gz", ".tgz"))


def short_hash(*parts: object) -> str:
    """Return 24 hexadecimal digits that identify `parts`."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system and path of a remote `url`: http(s), hf, and other installed drivers."""
    import fsspec

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # aiohttp's default ends every transfer after 5 minutes, which a large shard may exceed
        options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:  # unknown scheme, or its driver is not installed
        raise ConfigError(f"cannot open {url}: {error}") from error


def read_remote(url: str) -> bytes:
    """Return a small remote file. Raises LostShard after all retries."""
    fs, path = filesystem(url)
    return _with_retries(lambda: fs.cat_file(path), url)


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched and unpacked shards, shared by all processes of a machine.

    Args:
        folder: Created when needed.
        max_bytes: Limit of the shards; the least recently used are evicted. None: no limit.
        opened_s: `time.time()` of creation; shards that were unavailable before are tried again.
    """

    folder: Path
    max_bytes: int | None = None
    opened_s: float = field(default_factory=time.time)

    def open(self, shard: Shard, verify: Callable[[Path], object] | None = None) -> int:
        """Open the plain tar of a shard, fetched or unpacked first if needed; close it with `release`.

        Any number of processes may open the same shard: one fetches it, the others wait. An open shard is not evicted.

        Args:
            shard: Remote, or a local path.
            verify: Called with a newly fetched file; a DataError counts as a failed transfer.

        Returns:
            The file descriptor.

        Raises:
            LostShard: The shard is missing, or unavailable after all retries.
            DataError: The cache folder cannot be written.
            OSError: A local shard cannot be read.
        """
        try:
            target = self.path(shard)
            if not is_cached(shard.url):
                return os.open(target, os.O_RDONLY)
        except FileNotFoundError as error:
            raise LostShard(f"cannot read shard {shard.url}: {error}") from error
        with suppress(FileNotFoundError):
            return hold(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                with suppress(FileNotFoundError):  # fetched by another process meanwhile
                    return hold(target)
                self._raise_if_lost(target)
                make_room(target.parent, self.max_bytes, shard.bytes or 0)
                file = _fetch(shard, target, verify)
                make_room(target.parent, self.max_bytes)
                return file
        except OSError as error:
            raise DataError(
                f"cannot store {shard.url} in {target.parent}: {error}; free space there, limit the cache with "
                "data.cache_gib, or set data.cache_dir"
            ) from error

    def fetch(self, shard: Shard) -> Path:
        """Return the path of the plain tar of a shard, fetched if needed; arguments and errors as `open`."""
        release(self.open(shard))
        return self.path(shard)

    def path(self, shard: Shard) -> Path:
        """Return the path of the plain tar of a shard, whether or not it has been fetched."""
        path = Path(shard.url)
        if is_remote(shard.url):
            identity: tuple[object, ...] = (shard.url, shard.sha256)
        elif is_cached(shard.url):
            stat = path.stat()
            identity = (path.resolve(), stat.st_size, stat.st_mtime_ns)
        else:
            return path
        return self.folder / "shards" / f"{short_hash(*identity)}.tar"

    def _raise_if_lost(self, target: Path) -> None:
        """Raise the LostShard that another process recorded since `opened_s`, if it is recent."""
        record = _lost_record(target)
        if record.exists() and record.stat().st_mtime >= max(self.opened_s, time.time() - LOST_S):
            raise LostShard(record.read_text(encoding="utf-8"))


def _fetch(shard: Shard, target: Path, verify: Callable[[Path], object] | None) -> int:
    """Fetch a shard to `target` and return its held descriptor; record a failure for waiting processes."""
    temporary, record = target.with_name(f"{target.name}.tmp"), _lost_record(target)

    def attempt() -> None:
        temporary.unlink(missing_ok=True)
        _transfer(shard, temporary)
        if verify is not None:
            verify(temporary)

    try:
        _with_retries(attempt, shard.url)
        sync_file(temporary)
        file = hold(temporary)
        temporary.replace(target)
    except LostShard as error:
        record.write_text(str(error), encoding="utf-8")
        os.utime(record, (time.time(), time.time()))  # the clock of `opened_s`, which the kernel's lags
        raise
    finally:
        temporary.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    return file


def _lost_record(target: Path) -> Path:
    return target.with_name(f"{target.name}.lost")


def _transfer(shard: Shard, path: Path) -> None:
    """Copy a shard to `path`, verify its size and checksum, and unpack gzip."""
    if shard.url.startswith("pipe:"):
        with path.open("wb") as file:
            subprocess.run(shard.url.removeprefix("pipe:"), shell=True, stdout=file, check=True)
    elif is_remote(shard.url):
        fs, remote = filesystem(shard.url)
        fs.get_file(remote, str(path))
    else:
        shutil.copyfile(shard.url, path)
    if shard.sha256 is not None and (problem := file_problem(path, shard._asdict())):
        raise DataError(problem)
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        packed = path.replace(path.with_name(f"{path.name}.gz"))
        with gzip.open(packed) as source, path.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        packed.unlink()


def _with_retries(action: Callable[[], T], url: str) -> T:
    """Return the result of `action`, repeated after temporary errors. Raises LostShard after the last attempt."""
    attempts = ATTEMPTS if is_remote(url) else 1
    for attempt in count(1):
        try:
            return action()
        except ConfigError:
            raise
        except Exception as error:  # every fsspec driver raises its own types
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            reason = f"{type(error).__name__}: {error}"
            if attempt >= attempts or _is_permanent(error):
                raise LostShard(f"cannot fetch {url} (attempt {attempt} of {attempts}): {reason}") from error
            pause_s = BACKOFF_S * 2 ** (attempt - 1)
            log.warning("fetching %s failed (%s); retrying in %.0f s", url, reason, pause_s)
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def _is_permanent(error: Exception) -> bool:
    """Return whether another attempt cannot succeed."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, FileNotFoundError | PermissionError) or status in _PERMANENT_STATUS
