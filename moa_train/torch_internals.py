"""Undocumented parts of torch that runs depend on, each with its reason. Tested with torch 2.11 and 2.15.

`moa_ffn.torch_internals` is the same for the layer.
"""

from __future__ import annotations

import atexit
from typing import Any, TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader

__all__ = ["WorkerLoader"]

Batch = TypeVar("Batch")


class WorkerLoader(DataLoader[Batch]):
    """A `DataLoader` whose worker processes can be ended, also when the loader itself is already gone.

    torch ends workers when the iterator is garbage-collected: after a failure that comes too late for its queues,
    waits 10 seconds a worker, and lets workers live that ignore SIGTERM.
    """

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        _ITERATORS.add(iterator)
        return iterator

    def end_workers(self) -> None:
        """End the workers; the next iteration starts new ones."""
        if self._iterator is not None:
            _shut_down(self._iterator)
            self._iterator = None


_ITERATORS: WeakSet[Any] = WeakSet()


def _shut_down(iterator: Any) -> None:
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # one that waits for a server is not waited for
            worker.join(5)


@atexit.register
def _shut_down_all() -> None:
    for iterator in list(_ITERATORS):
        _shut_down(iterator)
