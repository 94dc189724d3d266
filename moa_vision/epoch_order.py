"""The sample at each position of each epoch: shards shuffled by windows, images repeated."""

from __future__ import annotations

import numpy as np

from moa_train.data_order import ORDER, generator, philox_key


class EpochOrder:
    """The order of samples as a function of (seed, epoch, position).

    Shards are shuffled, then the samples within windows of `shuffle_window_shards` shards. With R = `repeats`, R epochs
    share one such order of N samples: epoch e covers part e % R of it, N // R images, each at R consecutive positions.

    Args:
        starts: (S + 1,) first sample of each shard, and N.
        seed: Seed of the run, 0 or above.
        shuffle_window_shards: Shards of a window.
        repeats: R.
    """

    def __init__(self, starts: np.ndarray, seed: int, shuffle_window_shards: int, repeats: int = 1) -> None:
        self.starts = starts
        self.key = philox_key(seed, ORDER)
        self.shuffle_window_shards = shuffle_window_shards
        self.repeats = repeats
        self.slots = int(starts[-1]) // repeats
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of positions of an epoch."""
        return self.slots * self.repeats

    def sample(self, epoch: int, slot: int) -> int:
        """Return the sample of the epoch's image number `slot` (position // repeats), taken modulo their number."""
        shared, part = divmod(epoch, self.repeats)
        if self._cached[0] != shared:
            self._cached = (shared, self._permutation(shared))
        return int(self._cached[1][part * self.slots + slot % self.slots])

    def _permutation(self, shared: int) -> np.ndarray:
        """Return the (N,) int64 order that `repeats` epochs share."""
        stream = generator(self.key, shared, 0)
        shards = stream.permutation(len(self.starts) - 1)
        windows = []
        for first in range(0, len(shards), self.shuffle_window_shards):
            members = shards[first : first + self.shuffle_window_shards]
            window = np.concatenate([np.arange(int(self.starts[s]), int(self.starts[s + 1])) for s in members])
            stream.shuffle(window)
            windows.append(window)
        return np.concatenate(windows)
