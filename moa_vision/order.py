"""Which sample is at which position of which epoch, and the random numbers that belong to it.

Numbers come from counter-based Philox generators, whose key is the seed and whose counter is (epoch, position): every
position has a stream of its own, and none is replayed to reach another. No worker, rank or device has a say.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ORDER, SAMPLE = 0, 1  # what a generator is for; the two never share a stream


def philox_key(seed: int, purpose: int) -> np.ndarray:
    """(2,) uint64. Raises ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: 0 or more")
    return np.random.SeedSequence((seed, purpose)).generate_state(2, np.uint64)


def generator(key: np.ndarray, epoch: int, position: int) -> np.random.Generator:
    """The stream of (key, epoch, position), 2^64 blocks long."""
    return np.random.Generator(np.random.Philox(key=key, counter=(0, position, epoch, 0)))


class EpochOrder:
    """Which sample is at which position.

    Shards are shuffled, then the samples of each window of `window_shards` of them. With R = `repeats`, R epochs
    share one such order of N samples: epoch e walks through its part e % R, N // R images, each at R consecutive
    positions.

    Args:
        starts: (S + 1,) first sample of each shard, and N.
        seed: of the run; 0 or more.
        window_shards: shards of a window.
        repeats: R.
    """

    def __init__(self, starts: np.ndarray, seed: int, window_shards: int, repeats: int = 1) -> None:
        self.starts = starts
        self.key = philox_key(seed, ORDER)
        self.window_shards = window_shards
        self.repeats = repeats
        self.slots = int(starts[-1]) // repeats  # images an epoch
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Positions of an epoch."""
        return self.slots * self.repeats

    def sample(self, epoch: int, slot: int) -> int:
        """The sample that is the epoch's image number `slot` (position // repeats); counts on from the end at 0."""
        shared, part = divmod(epoch, self.repeats)
        if self._cached[0] != shared:
            self._cached = (shared, self._permutation(shared))
        return int(self._cached[1][part * self.slots + slot % self.slots])

    def _permutation(self, shared: int) -> np.ndarray:
        """(N,) int64: the order that `repeats` epochs share."""
        stream = generator(self.key, shared, 0)
        shards = stream.permutation(len(self.starts) - 1)
        windows = []
        for first in range(0, len(shards), self.window_shards):
            members = shards[first : first + self.window_shards]
            window = np.concatenate([np.arange(int(self.starts[s]), int(self.starts[s + 1])) for s in members])
            stream.shuffle(window)
            windows.append(window)
        return np.concatenate(windows)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, position) lists of one rank's micro-batches, step after step, from any step on."""

    def __init__(
        self, epoch_length: int, global_batch: int, micro_batch: int, rank: int, world_size: int, steps: range
    ) -> None:
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
