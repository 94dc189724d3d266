"""Shards as plain local tar files: remote ones are fetched whole, compressed ones unpacked, once per cache folder."""

import errno
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from filelock import FileLock
from fsspec.callbacks import Callback

from moa_train.atomic_io import sync_file, write_json
from moa_train.errors import DataError
from moa_vision.cache_eviction import hold, make_room, release

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 8
BACKOFF_S = 1.0  # the first pause between attempts; doubled each time: a server may be away for two minutes
STALL_S = 60.0  # a transfer that brings nothing for so long is given up and tried again
SERIES_S = 300.0  # all pauses and stalls of a shard's attempts together, in which others, and a Slurm warning, wait
PARSE_ATTEMPTS = 4  # for a manifest that comes, but not as one
MAX_READ = 2**30  # bytes of a manifest
LOST_S = 600.0  # a shard that could not be had is tried again after so long

_SIGPIPE = 128 + signal.SIGPIPE  # a shell's status where a command had more to say than the next one read
_GZIP_MAGIC = b"\x1f\x8b"
_SHARDS = "shards"  # folder in the cache folder
_FULL = {errno.ENOSPC, errno.EDQUOT}
_HOPELESS = {*_FULL, errno.EROFS, errno.EACCES, errno.EISDIR}


class LostShard(DataError):
    """A shard that cannot be had; others may be."""


class Shard(NamedTuple):
    """Where a shard is, and, where a manifest says so, its size in bytes and its SHA-256 as transferred."""

    url: str
    size: int | None = None
    sha256: str | None = None


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/moa_vision`, by default `~/.cache/moa_vision`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moa_vision"


def is_remote(url: str) -> bool:
    """Whether `url` names something outside the file system: `scheme://...` or `pipe:command`."""
    return url.startswith("pipe:") or bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url))


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def short_hash(*parts: object) -> str:
    """24 hexadecimal digits that name `parts`."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and path of a remote `url` (http, https, hf, and what else fsspec has a driver for)."""
    import fsspec

    options = {}
    if _is_http(url):
        import aiohttp

        # aiohttp ends every transfer after 5 minutes in all; a large shard may take longer, a stalled one must not
        options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=STALL_S)
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:  # an unknown scheme, or its driver is not installed
        raise DataError(f"cannot open {url}: {error}") from error


def is_kept(url: str) -> bool:
    """Whether a shard is read from a copy in the cache folder: it is remote, or compressed as its name says."""
    return is_remote(url) or url.endswith((".gz", ".tgz"))


class OpenShard(NamedTuple):
    """A plain tar file that is open for reading: its descriptor and its path."""

    file: int
    path: Path

    def close(self) -> None:
        """Closes it; from the cache it may go then."""
        release(self.file)


def open_shard(
    shard: Shard,
    cache_dir: Path,
    check: Callable[[Path], object] | None = None,
    limit: int | None = None,
    since_s: float = math.inf,
    least: int = 0,
) -> OpenShard:
    """Opens the plain tar file that holds `shard`; see `local_path`. One in the cache stays there until it is closed.

    Raises:
        LostShard: if it cannot be read or fetched.
        DataError: if there is no room for it.
    """
    for attempt in range(ATTEMPTS):
        try:
            path = local_path(shard, cache_dir, check, limit, since_s, least)
            in_cache = path.parent == cache_dir / _SHARDS
            return OpenShard(hold(path) if in_cache else os.open(path, os.O_RDONLY), path)
        except FileNotFoundError as error:
            if not is_remote(shard.url) and not Path(shard.url).exists():
                raise LostShard(f"cannot read shard {shard.url}: {error}") from error
            # else another process made room between look-up and opening
        except OSError as error:
            if attempt > 0 or _is_hopeless(error):
                raise LostShard(f"cannot read shard {shard.url}: {error}") from error
            time.sleep(BACKOFF_S)  # a network file system may fail for once
    raise DataError(f"{shard.url} is removed from {cache_dir} as soon as it is fetched; allow data.cache_gib more")


def local_path(
    shard: Shard,
    cache_dir: Path,
    check: Callable[[Path], object] | None = None,
    limit: int | None = None,
    since_s: float = math.inf,
    least: int = 0,
) -> Path:
    """The plain tar file that holds `shard`, fetched or unpacked into `cache_dir` if need be.

    Any number of processes may ask for the same shard: one fetches it, the others wait for that one.

    Args:
        shard: remote, or a local path.
        cache_dir: created if absent.
        check: called with a newly fetched file before it is let in; an exception means that the transfer failed.
        limit: bytes of shards in the cache folder; those that were not used for longest make room. Those that are
            being fetched may come on top meanwhile. None: no limit.
        since_s: a shard that some process found lost after this `time.time()`, and less than `LOST_S` ago, is lost
            without another attempt. By default it is tried.
        least: bytes that the plain tar of a remote or compressed shard has at least. One that comes shorter was cut
            on its way, and one in the cache that is shorter is fetched again.

    Raises:
        OSError: if a local shard cannot be read.
        LostShard: if a shard cannot be fetched; where another attempt may help, after `ATTEMPTS` of them, or as many
            as `SERIES_S` has room for: pauses and stalls, not the time in which bytes came.
        DataError: if the cache folder cannot take it.
    """
    if is_remote(shard.url):
        name = f"{short_hash(shard.url, shard.sha256)}-{_plain_name(shard.url)}"
    else:
        path = Path(shard.url)
        if not _is_gzip(path):
            return path
        stat = path.stat()
        name = f"{short_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)}-{_plain_name(path.name)}"
    return fetch(shard, cache_dir / _SHARDS / name, check, limit, since_s, least)


def fetch(
    shard: Shard,
    target: Path,
    check: Callable[[Path], object] | None = None,
    limit: int | None = None,
    since_s: float = math.inf,
    least: int = 0,
) -> Path:
    """Fetches any remote or local file to `target` (unpacked if it is gzip) unless it is there; see `local_path`."""
    if _is_there(target, least):
        return target

    def fits(path: Path) -> None:
        if not _is_there(path, least):
            raise DataError(
                f"{path.stat().st_size} bytes came, and its samples end at {least}: it is cut, or has changed since "
                f"it was indexed (then delete {target.parents[1] / 'index'})"
            )
        if check is not None:
            check(path)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_there(target, least):
                _believe_lost(target, since_s)
                make_room(target.parent, limit, wanted=max(shard.size or 0, least))
                _fetch_or_mark(shard, target, fits)
                make_room(target.parent, limit, keep=target)
    except OSError as error:
        raise _no_room(shard, target, error) from error
    return target


def _is_there(path: Path, least: int) -> bool:
    """Whether there is such a file of `least` bytes or more."""
    try:
        return path.stat().st_size >= least
    except FileNotFoundError:
        return False


def _believe_lost(target: Path, since_s: float) -> None:
    """Raises the LostShard that another process left as a mark since `since_s`, if that is less than `LOST_S` ago."""
    time_s, reason = 0.0, ""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # there is none, or none of ours
        mark = json.loads(_mark(target).read_bytes())
        time_s, reason = float(mark["time_s"]), str(mark["reason"])
    if reason and time_s >= since_s and time.time() - time_s < LOST_S:
        raise LostShard(reason)


def _fetch_or_mark(shard: Shard, target: Path, check: Callable[[Path], object]) -> None:
    """Fetches `target`, its lock held; leaves a mark beside it for those that wait if it cannot be had."""
    try:
        _fetch_with_patience(shard, target, check)
    except LostShard as error:
        with suppress(OSError):  # a full disk: every process tries for itself
            write_json(_mark(target), {"time_s": time.time(), "reason": str(error)})
        raise
    _mark(target).unlink(missing_ok=True)


def _mark(target: Path) -> Path:
    return target.with_name(f"{target.name}.lost")


def _fetch_with_patience(shard: Shard, target: Path, check: Callable[[Path], object]) -> None:
    """Fetches `target`, its lock held, in up to `ATTEMPTS` attempts, which may wait for `SERIES_S` in all.

    A transfer that goes on, however slowly, is not cut off, and the time in which its bytes came is not counted.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    waited_s = 0.0
    for attempt in range(ATTEMPTS):
        temporary.unlink(missing_ok=True)
        begin_s = time.monotonic()
        try:
            _transfer(shard, temporary)
            _pass(check, temporary)
            sync_file(temporary)
            temporary.replace(target)
            return
        except Exception as error:  # the drivers of fsspec raise their own types
            waited_s += _idle_s(temporary, time.monotonic() - begin_s)
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            pause_s = BACKOFF_S * 2**attempt
            waited_s += pause_s
            late = waited_s + STALL_S > SERIES_S  # the next attempt may stall
            if attempt + 1 == ATTEMPTS or late or not is_remote(shard.url) or _is_hopeless(error):
                reason = f"{type(error).__name__}: {_told(error)}"
                raise LostShard(f"cannot fetch {shard.url} (attempt {attempt + 1} of {ATTEMPTS}): {reason}") from error
            log.warning("fetching %s failed (%s); trying again in %.0f s", shard.url, _told(error), pause_s)
            time.sleep(pause_s)


def _idle_s(path: Path, lasted_s: float) -> float:
    """For how long nothing had come when a transfer to `path` failed that lasted so long."""
    try:
        stat = path.stat()
    except OSError:
        return lasted_s
    since_s = time.time() - stat.st_mtime  # a network file system's clock may be another
    return min(max(since_s, 0.0), lasted_s) if stat.st_size else lasted_s


def _pass(check: Callable[[Path], object], path: Path) -> None:
    """Checks a file that came; one that is not good may have been cut on its way: an OSError, to try again."""
    try:
        check(path)
    except DataError as error:
        raise OSError(str(error)) from error


def _no_room(shard: Shard, target: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot keep {shard.url} in {target.parent}: {error}; free space there, bound it by data.cache_gib, or "
        "choose another folder by data.cache_dir"
    )


def read_remote(url: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a small remote file, with the retries of `fetch`, not cached (it may change).

    Raises:
        ValueError: of `parse`, if that is so `PARSE_ATTEMPTS` times: the file may have been cut on its way.
        DataError: if it cannot be had, or has more than `MAX_READ` bytes.
    """
    for attempt in range(ATTEMPTS):
        try:
            data = _read(url)
        except Exception as error:
            if attempt + 1 == ATTEMPTS or _is_hopeless(error):
                raise DataError(f"cannot read {url}: {type(error).__name__}: {_told(error)}") from error
        else:
            try:
                return parse(data)
            except ValueError:
                if attempt + 1 >= PARSE_ATTEMPTS:
                    raise
        time.sleep(BACKOFF_S * 2**attempt)
    raise AssertionError("unreachable")


def _read(url: str) -> bytes:
    fs, path = filesystem(url)
    if not _is_http(url):
        return fs.cat_file(path)
    data = io.BytesIO()
    try:
        fs.get_file(path, data, callback=_Bound(MAX_READ))
    except _TooMuch as error:
        raise DataError(f"{error}: it is no manifest") from error
    return data.getvalue()


def _transfer(shard: Shard, path: Path) -> None:
    """One attempt: bytes to `path`, size and checksum compared, then unpacked if they are gzip."""
    bound = _Bound(shard.size)
    if shard.url.startswith("pipe:"):
        with path.open("wb") as file:
            _run_pipe(shard.url.removeprefix("pipe:"), file, bound)
    elif is_remote(shard.url):
        fs, remote = filesystem(shard.url)
        # other drivers ask for a file's size first, and take no more
        fs.get_file(remote, str(path), **({"callback": bound} if _is_http(shard.url) else {}))
    else:
        shutil.copyfile(shard.url, path)
    size = path.stat().st_size
    if shard.size is not None and size != shard.size:
        raise OSError(f"{size} bytes came, the manifest says {shard.size}")
    if shard.sha256 is not None and file_sha256(path) != shard.sha256:
        raise OSError("its SHA-256 is not the manifest's")
    if _is_gzip(path):
        unpacked = path.with_name(f"{path.name}.unpacked")
        try:
            with gzip.open(path) as source, unpacked.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            unpacked.replace(path)
        finally:
            unpacked.unlink(missing_ok=True)


class _TooMuch(OSError):
    """More bytes came than are allowed."""


class _Bound(Callback):
    """Ends a transfer that has brought more than `limit` bytes: a server may send without end. None: no limit."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit

    def relative_update(self, inc: int = 1) -> None:
        """So many bytes more have come. Raises _TooMuch if there were enough before."""
        super().relative_update(inc)
        if self.limit is not None and self.value > self.limit:
            raise _TooMuch(f"more than the {self.limit} bytes came that it may have")


def _run_pipe(command: str, file: IO[bytes], bound: _Bound) -> None:
    """Writes what a shell's command prints to `file`. Raises OSError if it fails, or prints nothing for `STALL_S`."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        poll = select.poll()
        poll.register(process.stdout)
        while poll.poll(1000 * STALL_S):
            data = os.read(process.stdout.fileno(), 1 << 20)
            if not data:
                break
            file.write(data)
            bound.relative_update(len(data))
        else:
            raise TimeoutError
        status = process.wait(STALL_S)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise TimeoutError(f"nothing came for {STALL_S:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
        process.stdout.close()
    if status not in (0, _SIGPIPE):
        raise OSError(f"{command!r}: exit {status}")


def _told(error: Exception) -> str:
    """An error's message; fsspec gives a stall none."""
    if not isinstance(error, TimeoutError) or str(error):
        return str(error)
    cause = str(error.__cause__ or "")
    return cause if cause.startswith("Connection") else f"nothing came for {STALL_S:g} s"


def _is_hopeless(error: Exception) -> bool:
    """Whether another attempt cannot help: not there, not allowed, no space."""
    if isinstance(error, FileNotFoundError | PermissionError | DataError):
        return True
    if isinstance(error, OSError) and error.errno in _HOPELESS:
        return True
    if type(error.__cause__).__module__.startswith("aiohttp."):  # what came was no HTTP; aiohttp calls that status 400
        return False
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP_MAGIC


def _plain_name(url: str) -> str:
    """The last component of `url` as a short, harmless file name without the compression's suffix."""
    name = re.split(r"[/\\]", url.split("?")[0].rstrip("/"))[-1]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]
    return re.sub(r"\.tgz$", ".tar", re.sub(r"\.gz$", "", name))
