"""File descriptors for reading by offset: the last used stay open, and every process has its own.

On a network file system a descriptor may fail for good (ESTALE), or once (EIO), while the file can be opened again.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

RETRY_S = 1.0  # the pause before a file that could not be read is opened again

Result = TypeVar("Result")


class OpenFiles:
    """The descriptors of the files that were used last.

    Args:
        limit: How many stay open; 1 or more.
        close: What closes a descriptor.
    """

    def __init__(self, limit: int, close: Callable[[int], object] = os.close) -> None:
        self.limit = limit
        self._close = close
        self._files: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, name: Hashable, opened: Callable[[], int]) -> int:
        """Return the descriptor of file `name`; one that is not open is opened by `opened`, whose errors pass."""
        if name not in self._files:
            self._files[name] = opened()
            if len(self._files) > self.limit:
                self._close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def read(self, name: Hashable, opened: Callable[[], int], read: Callable[[int], Result]) -> Result:
        """Return `read` of the descriptor that `get` returns.

        An OSError closes the file, which is opened and read once more after a pause; a second one passes.
        """
        try:
            return read(self.get(name, opened))
        except OSError:
            if name in self._files:
                with suppress(OSError):  # of the same fault
                    self._close(self._files.pop(name))
        time.sleep(RETRY_S)
        return read(self.get(name, opened))

    def close(self) -> None:
        """Close the files; `get` opens them again."""
        while self._files:
            self._close(self._files.popitem()[1])

    def __del__(self) -> None:
        """Leave none open."""
        if "_files" in self.__dict__:  # else it was never finished
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without the files."""
        return {"limit": self.limit, "_close": self._close, "_files": OrderedDict()}


def open_to_read(path: Path) -> int:
    """Return a new descriptor of a file, for `os.preadv`. Raises OSError."""
    return os.open(path, os.O_RDONLY)
