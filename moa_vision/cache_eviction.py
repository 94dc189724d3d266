"""Room in a folder of cached files: those that were not used for longest go, except where somebody reads them.

A reader holds a shared lock (flock) on each file that it has open; whoever makes room removes only files on which it
gets an exclusive one. Locks end with their process, so a killed one leaves nothing in use. Where a file system has no
such locks, a file may go while it is read; its bytes stay readable for those that have it open.
"""

import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

log = logging.getLogger(__name__)

_TRANSFERS = (".tmp", ".tmp.unpacked")  # what `moa_vision.cache.fetch` has under way


class _Cached(NamedTuple):
    used_ns: int
    size: int
    path: Path


def hold(path: Path) -> int:
    """Opens a cached file for reading, and marks it as used now and in use until `release`.

    Returns:
        Its file descriptor.

    Raises:
        FileNotFoundError: if it was removed, perhaps this moment.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        path.stat()  # still there: nobody removes it from here on
    except BaseException:
        os.close(file)
        raise
    with suppress(OSError):  # a cache that belongs to somebody else
        os.utime(path)
    return file


def release(file: int) -> None:
    """Ends `hold`, also for the processes that were forked meanwhile."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def make_room(folder: Path, limit: int | None, wanted: int = 0, keep: Path | None = None) -> None:
    """Removes what killed transfers left in a folder, then the least recently used files, until it is small enough.

    Any number of processes may do so at the same time. Of what others have under way only the bytes that came are
    counted, so that the folder may exceed the limit by a file for each of them, until they end and make room again.

    Args:
        folder: of files that were fetched; FILE.tmp is a transfer that whoever has locked FILE.lock is making.
        limit: in bytes, of all files together; None: no limit.
        wanted: bytes of a file that is to come.
        keep: a file that stays.
    """
    with FileLock(f"{folder}.lock"):
        for path in folder.iterdir():
            if path.name.endswith(_TRANSFERS):
                _remove_leftover(path)
        if limit is None:
            return
        files = [found for path in folder.iterdir() if path.suffix != ".lock" and (found := _look(path))]
        excess = sum(file.size for file in files) + wanted - limit
        for _, size, path in sorted(files):
            if excess > 0 and path != keep and not path.name.endswith(_TRANSFERS) and _remove_unless_held(path):
                excess -= size
        if excess > 0:
            log.warning("%s is %.3g GiB above data.cache_gib: what is left there is in use", folder, excess / 2**30)


def _look(path: Path) -> _Cached | None:
    """A file's time of use and size; None if it has just gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return _Cached(stat.st_mtime_ns, stat.st_size, path)


def _remove_leftover(path: Path) -> None:
    """Removes FILE.tmp unless its transfer goes on, that is, unless somebody has locked FILE.lock."""
    lock = path.with_name(f"{path.name.split('.tmp')[0]}.lock")
    with suppress(OSError):  # no such lock: not a transfer; or locked: it goes on
        file = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(file)


def _remove_unless_held(path: Path) -> bool:
    """Whether a file is gone now: removed, unless somebody reads it."""
    try:
        file = os.open(path, os.O_RDWR)  # network file systems lock exclusively for writers only
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        path.unlink(missing_ok=True)
        return True
    except OSError:  # not ours to remove
        return False
    finally:
        os.close(file)
