"""Files that are whole or absent: written beside their place, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one rename; a reader sees the old content or the new."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON. Raises ValueError for NaN or infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sync_file(path: Path) -> None:
    """Force a finished file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (the result of a rename) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving without an error it is synced and renamed to `final`.

    An older folder of that name is replaced; it leaves its place only when the new one is complete.
    """
    temporary, previous = (final.with_name(f".{final.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in (*temporary.rglob("*"), temporary):
        sync_folder(path) if path.is_dir() else sync_file(path)
    if final.exists():
        final.rename(previous)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _end_of_lines(path: Path) -> int:
    """Return the size of a file of lines in bytes, without a last line that was cut short."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            first = max(0, end - 65536)
            file.seek(first)
            newline = file.read(end - first).rfind(b"\n")
            if newline >= 0:
                return first + newline + 1
            end = first
    return 0


class LineFile:
    """A file of lines that one process adds to.

    A line is handed to the system at once, so that a killed process loses none; what a crash cut short is taken away
    before the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._mended = False

    def append(self, line: str) -> None:
        """Add a line. Raises OSError if it cannot be written (a full disk); it is then added with the next one."""
        self._waiting.append(line + "\n")
        content = "".join(self._waiting).encode("utf-8")
        with self.path.open("ab", buffering=0) as file:
            if not self._mended:
                file.truncate(_end_of_lines(self.path))
                self._mended = True
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()
