"""Undocumented parts of torch that runs depend on, each with its reason. Tested with torch 2.11 and 2.15.

`moa_ffn.torch_internals` is the same for the layer.
"""

from __future__ import annotations

import atexit
from typing import Any, TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader

from moa_train.errors import RunError

__all__ = ["MORE_SHARED_MEMORY", "WorkerError", "WorkerLoader"]

Batch = TypeVar("Batch")

MORE_SHARED_MEMORY = "make /dev/shm larger (docker run --shm-size=8g, or --ipc=host)"


class WorkerError(RunError):
    """A data worker that ran out of memory; the message says which setting to change."""


class WorkerLoader(DataLoader[Batch]):
    """A DataLoader whose worker processes are killed when they are no longer needed, at exit at the latest.

    torch ends workers when the iterator is garbage-collected. After a failure that is too late for its queues, and it
    never ends workers that ignore SIGTERM.
    """

    def _get_iterator(self) -> Any:
        try:
            iterator = super()._get_iterator()
        except OSError as error:  # no room for a semaphore in /dev/shm, or no memory for a process
            raise WorkerError(
                f"data.workers is {self.num_workers}, and the workers cannot be started ({error}); "
                f"{MORE_SHARED_MEMORY}, or use fewer data.workers"
            ) from error
        _ITERATORS.add(iterator)
        return iterator

    def end_workers(self) -> None:
        """End the workers; the next iteration starts new ones."""
        if self._iterator is not None:
            _kill_workers(self._iterator)
            self._iterator = None


_ITERATORS: WeakSet[Any] = WeakSet()


def _kill_workers(iterator: Any) -> None:
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()
            worker.join(5)


@atexit.register
def _kill_all_workers() -> None:
    for iterator in list(_ITERATORS):
        _kill_workers(iterator)
