"""Which position of which epoch a step takes, the random numbers that belong to it, and the loader of such batches.

Numbers come from counter-based Philox generators, whose key is the seed and whose counter is (epoch, position): every
position has a stream of its own, and none is replayed to reach another. No worker, rank or device has a say.
"""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from moa_train.torch_internals import MORE_SHARED_MEMORY, WorkerError, WorkerLoader

Batch = TypeVar("Batch")

ORDER, SAMPLE = 0, 1  # what a generator is for; the two never share a stream

SHARED_MEMORY = "/dev/shm"


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
    return WorkerLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=to_main_process,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own, so that beginning an epoch leaves the run's generator alone
    )


def end_workers(batches: Iterable[Any]) -> None:
    """End the worker processes of a loader of `batch_loader`, if it is one; its next iteration starts new ones."""
    if isinstance(batches, WorkerLoader):
        batches.end_workers()


def worker_died(error: Exception) -> WorkerError | None:
    """Return what to tell instead of an error of torch's about a loader's worker that something has killed."""
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return None
    reason = str(error).partition("\n")[0]
    return WorkerError(
        f"a process that reads the data has ended ({reason}), mostly for want of memory, its own or /dev/shm's: use "
        f"fewer data.workers, give them more memory, or {MORE_SHARED_MEMORY}. The same command continues"
    )


def to_main_process(batch: Any, augment: Callable[[Any], Any] | None = None) -> Any:
    """Return a batch with its tensors in shared memory, if this is a loader's worker; for a `collate_fn`.

    The queue's feeder thread would put them there, and lose a batch that does not fit while the main process waits.

    Args:
        batch: Tensors in any nesting of tuples, lists and dicts.
        augment: Makes of it the batch that is sent.

    Raises:
        WorkerError: there is too little shared memory.
    """
    batch = batch if augment is None else augment(batch)
    worker = get_worker_info()
    if worker is None:
        return batch
    try:
        return recursively_apply(Tensor.share_memory_, batch)
    except RuntimeError as error:
        if not any(f"({number})" in str(error) for number in (errno.ENOSPC, errno.ENOMEM)):
            raise
        raise WorkerError(
            f"data.workers is {worker.num_workers}, and a batch of one does not fit into shared memory{_free()}: "
            f"{MORE_SHARED_MEMORY}, or use fewer data.workers (0: none) or a smaller "
            "loop.micro_batch_size. The same command continues"
        ) from error


def _free() -> str:
    """Return e.g. " (/dev/shm: 3 of 64 MiB free)", "" where there is no such folder."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return ""
    return f" ({SHARED_MEMORY}: {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free)"
