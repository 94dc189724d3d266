"""Which position of which epoch a step takes, the random numbers that belong to it, and the loader of such batches.

Numbers come from counter-based Philox generators, whose key is the seed and whose counter is (epoch, position): every
position has a stream of its own, and none is replayed to reach another. No worker, rank or device has a say.
"""

import atexit
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = TypeVar("Batch")

ORDER, SAMPLE = 0, 1  # what a generator is for; the two never share a stream


def philox_key(seed: int, purpose: int) -> np.ndarray:
    """(2,) uint64. Raises ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    return np.random.SeedSequence((seed, purpose)).generate_state(2, np.uint64)


def generator(key: np.ndarray, epoch: int, position: int) -> np.random.Generator:
    """The stream of (key, epoch, position), 2^64 blocks long."""
    return np.random.Generator(np.random.Philox(key=key, counter=(0, position, epoch, 0)))


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, position) lists of one rank's micro-batches, step after step, from any step on.

    Args:
        epoch_length: positions of an epoch, at least `global_batch`; the last partial global batch is dropped.
        global_batch: positions of a step, over all ranks and micro-batches.
        micro_batch: positions of one list.
        rank: of this process.
        world_size: number of ranks.
        steps: which steps, counted from 0 over all epochs.

    Raises:
        ValueError: if the global batch does not split into micro-batches.
    """

    def __init__(
        self, epoch_length: int, global_batch: int, micro_batch: int, rank: int, world_size: int, steps: range
    ) -> None:
        if global_batch % (world_size * micro_batch):
            per_rank = [b for b in range(1, global_batch // world_size + 1) if global_batch % (world_size * b) == 0]
            nearest = sorted(per_rank, key=lambda b: abs(b - micro_batch))[:3]
            raise ValueError(
                f"a global batch of {global_batch} does not split over {world_size} ranks into micro-batches of "
                f"{micro_batch}; the nearest micro-batches that work: {nearest or 'none'}"
            )
        self.steps_per_epoch = epoch_length // global_batch
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps) * (self.global_batch // (self.world_size * self.micro_batch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch, number = divmod(step, self.steps_per_epoch)
            first = number * self.global_batch + self.rank * self.micro_batch
            for start in range(first, (number + 1) * self.global_batch, self.world_size * self.micro_batch):
                yield [(epoch, position) for position in range(start, start + self.micro_batch)]


def batch_loader(dataset: Dataset[Batch], batches: Iterable[Any], workers: int) -> DataLoader[Batch]:
    """A loader of what the data set's `__getitems__` makes of each of `batches`, in their order.

    Args:
        dataset: with a `__getitems__` that takes one of `batches` and returns a whole batch.
        batches: a sampler or a list, iterated anew for each epoch of the loader.
        workers: processes beside this one; 0: none.
    """
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own, so that beginning an epoch leaves the run's generator alone
    )


class _Loader(DataLoader[Batch]):
    """A loader whose workers can be ended, also once it is gone itself."""

    def _get_iterator(self) -> Any:  # torch has no public name for any of this
        iterator = super()._get_iterator()
        _ITERATORS.add(iterator)
        return iterator


_ITERATORS: WeakSet[Any] = WeakSet()


def end_workers(batches: Iterable[Any]) -> None:
    """End the workers of a loader of `batch_loader`, if it is one; its next iteration starts new ones.

    Left to the garbage collector, the loader of a failed run loses its queues before it can tell its workers to end:
    torch then waits 10 seconds for each, and those that ignore SIGTERM keep the program from ending at all.
    """
    if isinstance(batches, _Loader) and batches._iterator is not None:
        _end(batches._iterator)
        batches._iterator = None


def _end(iterator: Any) -> None:
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # one that waits for a server is not waited for
            worker.join(5)


def worker_died(error: Exception) -> Exception | None:
    """Return what to tell instead of an error of torch's about a loader's worker that something has killed."""
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return None
    reason = str(error).partition("\n")[0]
    return RuntimeError(
        f"a process that reads the data has ended ({reason}), mostly for want of memory, its own or /dev/shm's: use "
        "fewer data.workers, or give them more. The same command continues"
    )


@atexit.register
def _end_all() -> None:
    for iterator in list(_ITERATORS):
        _end(iterator)


def _as_it_is(batch: Any) -> Any:
    return batch
