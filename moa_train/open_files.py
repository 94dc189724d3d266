"""Cache of open file descriptors for reads by offset; each process has its own."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

RETRY_S = 1.0
"""Pause before a file that could not be read is opened again."""

Result = TypeVar("Result")


class OpenFiles:
    """The `limit` most recently used file descriptors, closed by the function `close`."""

    def __init__(self, limit: int, close: Callable[[int], object] = os.close) -> None:
        self.limit = limit
        self._close = close
        self._files: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, name: Hashable, opened: Callable[[], int]) -> int:
        """Return the descriptor of file `name`, opened by `opened` if it is not open."""
        if name not in self._files:
            self._files[name] = opened()
            if len(self._files) > self.limit:
                self._close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def read(self, name: Hashable, opened: Callable[[], int], read: Callable[[int], Result]) -> Result:
        """Return `read(descriptor)`; after an OSError reopen the file and try once more.

        A descriptor on a network file system may become stale (ESTALE) or fail once (EIO).
        """
        try:
            return read(self.get(name, opened))
        except OSError:
            if name in self._files:
                with suppress(OSError):
                    self._close(self._files.pop(name))
        time.sleep(RETRY_S)
        return read(self.get(name, opened))

    def close(self) -> None:
        """Close all files; `get` opens them again."""
        while self._files:
            self._close(self._files.popitem()[1])

    def __del__(self) -> None:
        if "_files" in self.__dict__:  # absent if the constructor failed
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_close": self._close, "_files": OrderedDict()}


def open_to_read(path: Path) -> int:
    """Return a new descriptor of a file, for `os.preadv`."""
    return os.open(path, os.O_RDONLY)
