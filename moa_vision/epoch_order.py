"""Which sample is at which position of which epoch: shards shuffled by windows, images repeated."""

import numpy as np

from moa_train.data_order import ORDER, generator, philox_key


class EpochOrder:
    """Which sample is at which position.

    Shards are shuffled, then the samples within windows of `shuffle_window_shards` shards. With R = `repeats`, R epochs
    share one such order of N samples: epoch e walks through its part e % R, N // R images, each at R consecutive
    positions.

    Args:
        starts: (S + 1,) first sample of each shard, and N.
        seed: of the run; 0 or more.
        shuffle_window_shards: shards of a window.
        repeats: R.
    """

    def __init__(self, starts: np.ndarray, seed: int, shuffle_window_shards: int, repeats: int = 1) -> None:
        self.starts = starts
        self.key = philox_key(seed, ORDER)
        self.shuffle_window_shards = shuffle_window_shards
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
        for first in range(0, len(shards), self.shuffle_window_shards):
            members = shards[first : first + self.shuffle_window_shards]
            window = np.concatenate([np.arange(int(self.starts[s]), int(self.starts[s + 1])) for s in members])
            stream.shuffle(window)
            windows.append(window)
        return np.concatenate(windows)
