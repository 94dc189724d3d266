"""Undocumented parts of torch that runs depend on, each with its reason. Tested with torch 2.11 and 2.15.

`moa_ffn.torch_internals` is the same for the layer.
"""

from __future__ import annotations

import atexit
from typing import Any, TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader

__all__ = ["MORE_SHARED_MEMORY", "WorkerError", "WorkerLoader"]

Batch = TypeVar("Batch")


MORE_SHARED_MEMORY = "make /dev/shm larger (docker run --shm-size=8g, or --ipc=host)"


class WorkerError(RuntimeError):
    """A loader's worker lacks memory, shared or its own; the message says what to change."""


class WorkerLoader(DataLoader[Batch]):
    """A `DataLoader` whose worker processes can be ended, also when the loader itself is already gone.

    torch ends workers when the iterator is garbage-collected: after a failure that comes too late for its queues,
    waits 10 seconds a worker, and lets workers live that ignore SIGTERM.
    """

    def _get_iterator(self) -> Any:
        try:
            iterator = super()._get_iterator()
        except OSError as error:  # of a semaphore, which lies in shared memory, or of a new process
            raise WorkerError(
                f"data.workers is {self.num_workers}, and they cannot be started ({error}): {MORE_SHARED_MEMORY}, or "
                "use fewer data.workers (0: none). The same command continues"
            ) from error
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
