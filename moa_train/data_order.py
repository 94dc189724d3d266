"""Order of the training samples, their random generators, and the loader of their batches.

Random numbers come from counter-based Philox generators: the key is the seed, the counter is (epoch, position). Each
position has its own stream, on any worker, rank or device, and no stream is replayed to reach another.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from moa_train.errors import ConfigError, require
from moa_train.torch_internals import MORE_SHARED_MEMORY, WorkerError, WorkerLoader

Batch = TypeVar("Batch")

ORDER, SAMPLE = 0, 1
"""Purposes of a generator; they never share a stream."""


def philox_key(seed: int, purpose: int) -> np.ndarray:
    """Return the key (2,) uint64 of a seed and a purpose. Raises ConfigError for a negative seed."""
    require("seed", seed, seed >= 0, "0 or above")
    return np.random.SeedSequence((seed, purpose)).generate_state(2, np.uint64)


def generator(key: np.ndarray, epoch: int, position: int) -> np.random.Generator:
    """Return the generator of (key, epoch, position); its stream is 2^64 blocks long."""
    return np.random.Generator(np.random.Philox(key=key, counter=(0, position, epoch, 0)))


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, position) lists of one rank's micro-batches, step after step, from any step on.

    An epoch has `epoch_length` positions, of which the last partial global batch is dropped. `steps` are counted
    from 0 over all epochs. Raises ConfigError unless the global batch is a multiple of world_size * micro_batch.
    """

    def __init__(
        self, epoch_length: int, global_batch: int, micro_batch: int, rank: int, world_size: int, steps: range
    ) -> None:
        if global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"a global batch of {global_batch} does not split over {world_size} ranks into micro-batches of "
                f"{micro_batch}; use a multiple of {world_size * micro_batch}"
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
    """Return a loader of `dataset.__getitems__(batch)`, a whole batch, for each of `batches`, in their order."""
    return WorkerLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=to_main_process,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own: starting an epoch must not draw from the global generator
    )


def end_workers(batches: Iterable[Any]) -> None:
    """End the worker processes of a loader from `batch_loader`; other iterables are left alone."""
    if isinstance(batches, WorkerLoader):
        batches.end_workers()


def worker_died(error: Exception) -> WorkerError | None:
    """Return a WorkerError if `error` is torch's report of a killed data worker, else None.

    A worker that is killed while a batch is received from it breaks the connection instead.
    """
    receiving = any(frame.name == "rebuild_storage_fd" for frame in traceback.extract_tb(error.__traceback__))
    reported = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    if not reported and not (receiving and isinstance(error, ConnectionError | EOFError | FileNotFoundError)):
        return None
    reason = str(error).partition("\n")[0] or type(error).__name__
    return WorkerError(
        f"a data worker was killed ({reason}), usually because memory or /dev/shm is full; use fewer data.workers, or "
        f"{MORE_SHARED_MEMORY}"
    )


def to_main_process(batch: Any, augment: Callable[[Any], Any] | None = None) -> Any:
    """Return a batch with its tensors in shared memory if this is a data worker; a loader's `collate_fn`.

    torch would move them in a background thread of its queue, where a batch that does not fit is lost and the main
    process waits for it forever. `augment` is applied to the batch first.

    Raises:
        WorkerError: Shared memory is full.
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
            f"data.workers is {worker.num_workers}, and a batch does not fit into shared memory; {MORE_SHARED_MEMORY}, "
            "use fewer data.workers, or a smaller loop.micro_batch_size"
        ) from error
