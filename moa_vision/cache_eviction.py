"""Eviction from a folder of cached files: the least recently used go first, files in use stay.

A reader holds a shared lock (flock) on every file that it has open. Eviction removes a file only under an exclusive
lock. Locks end with their process.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def hold(path: Path) -> int:
    """Open a cached file for reading, mark it as used now, and protect it from eviction until `release`.

    Returns:
        The file descriptor.

    Raises:
        FileNotFoundError: The file is absent.
    """
    file = os.open(path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(PermissionError):  # another user's cache
        os.utime(file)
    return file


def release(file: int) -> None:
    """End `hold`, also for processes forked since."""
    with suppress(OSError):  # a file system without locks, where only uncached shards can lie
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def make_room(folder: Path, max_bytes: int | None, incoming: int = 0) -> None:
    """Remove leftovers of killed transfers, then evict files until `incoming` more bytes fit.

    Processes may call this concurrently. Transfers in progress may exceed the limit temporarily.

    Args:
        folder: The cache; FILE.tmp is a transfer by the process that holds FILE.lock.
        max_bytes: Limit of the sum of all files; None: no limit.
        incoming: Size of a file about to be fetched.
    """
    with FileLock(f"{folder}.lock"):
        for path in folder.glob("*.tmp*"):
            with suppress(Timeout), FileLock(path.with_name(f"{path.name.split('.tmp')[0]}.lock"), timeout=0):
                path.unlink(missing_ok=True)
        if max_bytes is None:
            return
        files = sorted(_cached(folder))
        excess = sum(size for _, size, _ in files) + incoming - max_bytes
        for _, size, path in files:
            if excess > 0 and ".tmp" not in path.name and _evict(path):
                excess -= size
        if excess > 0:
            log.warning("%s exceeds data.cache_gib by %.3g GiB: its shards are in use", folder, excess / 2**30)


def _cached(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield time of last use, size and path of each file."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a transfer just finished
            if path.suffix not in (".lock", ".lost"):
                stat = path.stat()
                yield stat.st_mtime_ns, stat.st_size, path


def _evict(path: Path) -> bool:
    """Remove a file unless it is in use; return whether it is gone."""
    try:
        with path.open("rb+") as file:  # network file systems grant exclusive locks to writers only
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # in use, or another user's
        return not path.exists()
    return True
