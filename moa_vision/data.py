"""Batches of images (B, C, H, W) and mask noise, in an order that is a function of (seed, epoch, position).

Position p of epoch e has the same pixels and noise for any number of workers and ranks and any first step; see
`EpochOrder` and `moa_train.data_order`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moa_train.data_order import ORDER, SAMPLE, StepBatches, batch_loader, generator, philox_key
from moa_train.errors import ConfigError, DataError, require
from moa_vision.cache import LostShard
from moa_vision.crops import CROP_DRAWS, Box, central_box, crop_into, random_box
from moa_vision.images import ImageError, decode_image
from moa_vision.index import ShardIndex, ShardReader
from moa_vision.table import BadSample


@dataclass(frozen=True)
class DataConfig:
    """Image shards and their augmentation.

    Args:
        train: Training shards: a folder of scripts/make_shards.py, or tars by path, {brace}, glob, http(s)://,
            hf:// or pipe:command; several joined by "::".
        val: Validation shards, in the same form; null: no validation.
        image_key: Image among a sample's members: input.jpg for KEY.input.jpg; several in order of preference,
            "input.jpg;jpg". Null: jpg, png, ..., or the only member with such a suffix. Ignored for shards of
            scripts/make_shards.py.
        shuffle_window_shards: Shards whose samples are shuffled together; reads stay within this many files.
        repeated_augmentation: Number of crops of each decoded image, at consecutive positions; an epoch reads
            1/repeated_augmentation of the images.
        crop_scale: Smallest and largest area of a training crop, as a fraction of the image.
        crop_ratio: Smallest and largest width / height of a training crop before it is resized.
        hflip: Mirror half of the training crops.
        val_crop_pct: Side of the central validation crop, as a fraction of the image's.
        mean: Mean of the normalization of pixels in [0, 1], per channel, or one value for all channels. The default is
            ImageNet's; models with other than three channels get its average, as in timm.
        std: Standard deviation of the normalization, in the same form.
        workers: Decoding processes per device; 0: decode in the training process.
        cache_dir: Folder of indices and of remote shards; default ~/.cache/moa_vision.
        cache_gib: Limit of the remote shards kept there, in GiB; the least recently used are evicted.
            Shards in transfer may exceed it temporarily. Null: no limit.
        max_bad_samples: Number of distinct unusable samples, over all sessions of the run, after which it stops; an
            unavailable shard with more samples stops it too.
    """

    train: str
    val: str | None = None
    image_key: str | None = None
    shuffle_window_shards: int = 8
    repeated_augmentation: int = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: bool = True
    val_crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    workers: int = 4
    cache_dir: str | None = None
    cache_gib: float | None = None
    max_bad_samples: int = 100

    def __post_init__(self) -> None:
        """Check the ranges."""
        lowest = {"shuffle_window_shards": 1, "repeated_augmentation": 1, "workers": 0, "max_bad_samples": 0}
        for name, least in lowest.items():
            require(f"data.{name}", getattr(self, name), getattr(self, name) >= least, f"{least} or above")
        (small, large), (narrow, wide) = self.crop_scale, self.crop_ratio
        require("data.crop_scale", self.crop_scale, 0 < small <= large <= 1, "two fractions, the smaller one first")
        require("data.crop_ratio", self.crop_ratio, 0 < narrow <= wide, "two positive numbers, the smaller one first")
        require("data.val_crop_pct", self.val_crop_pct, 0 < self.val_crop_pct <= 1, "above 0 and at most 1")
        require("data.mean", self.mean, len(self.mean) > 0, "a number for each channel")
        require("data.std", self.std, min(self.std, default=0) > 0, "a positive number for each channel")
        require("data.cache_gib", self.cache_gib, self.cache_gib is None or self.cache_gib > 0, "above 0, or null")
        has_key = self.image_key is None or bool(self.image_key.strip(" .;"))
        require("data.image_key", self.image_key, has_key, "a name such as input.jpg")

    def for_channels(self, channels: int) -> DataConfig:
        """Return this configuration with `channels` values in `mean` and `std`.

        Raises:
            ConfigError: They have another number of values.
        """
        fitted = {}
        for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            values = getattr(self, name)
            if values == default and channels != 3:
                values = (sum(default) / 3,)
            wanted = f"{channels} values, one for each channel (model.encoder_args.in_chans), or one for all"
            require(f"data.{name}", values, len(values) in (1, channels), wanted)
            fitted[name] = values if len(values) == channels else values * channels
        return replace(self, **fitted)


class ImageBatch(NamedTuple):
    """B images with the noise that orders their patches for masking.

    Attributes:
        images: (B, C, H, W), channels-last in memory; uint8, or float32 in [0, 1] units if a sample has more than 8
            bits (`moa_vision.images`).
        noise: (B, L) float32, uniform in [0, 1).
        keys: B sample names, SHARD/KEY; see `ShardIndex.name`.
        labels: (B,) int64, -1 for none.
        bad: Samples found unusable while the batch was made.
    """

    images: Tensor
    noise: Tensor
    keys: list[str]
    labels: Tensor
    bad: list[BadSample]


class BatchSpec(NamedTuple):
    """Shape of a batch: height and width of the crops in pixels, length L of the noise, channels C."""

    image_size: tuple[int, int]
    noise_length: int
    channels: int = 3


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


class _Samples(Dataset[ImageBatch]):
    """Decoded images of an index; with a bounded cache at most `bounded_files` shards are open, and so not evicted."""

    def __init__(self, index: ShardIndex, config: DataConfig, spec: BatchSpec, bounded_files: int) -> None:
        self.index = index
        self.config = config
        self.spec = spec
        open_files = {} if index.cache.max_bytes is None else {"open_files": bounded_files}
        self.reader = ShardReader(index, config.max_bad_samples, **open_files)

    def decode(self, sample: int, bad: list[BadSample]) -> Tensor | None:
        """Return a sample's image, or None after adding it to `bad`."""
        try:
            return decode_image(self.reader.read(sample), self.spec.channels)
        except (ImageError, OSError, LostShard) as error:
            bad.append(self.index.bad(sample, error))
            return None


class TrainSamples(_Samples):
    """Random crops by (epoch, position)."""

    def __init__(self, index: ShardIndex, config: DataConfig, spec: BatchSpec, seed: int) -> None:
        super().__init__(index, config, spec, bounded_files=config.shuffle_window_shards)
        self.key = philox_key(seed, SAMPLE)
        self.order = EpochOrder(index.starts, seed, config.shuffle_window_shards, config.repeated_augmentation)

    def __getitems__(self, where: Sequence[tuple[int, int]]) -> ImageBatch:
        """Return the batch of these epochs and positions; crops of the same image share its decoding."""
        batch = _BatchBuilder(self.index, len(where), self.spec)
        current, image, sample = None, torch.empty(0), -1
        for epoch, position in where:
            slot = position // self.config.repeated_augmentation
            if (epoch, slot) != current:
                current = (epoch, slot)
                image, sample = self._image(epoch, slot, batch.bad)
            stream = generator(self.key, epoch, position)
            draws = stream.random(CROP_DRAWS + 1)
            height, width = image.shape[:2]
            box = random_box(draws[1:], height, width, self.config.crop_scale, self.config.crop_ratio)
            batch.add(sample, image, box, stream, flip=self.config.hflip and bool(draws[0] < 0.5))
        return batch.finish()

    def _image(self, epoch: int, slot: int, bad: list[BadSample]) -> tuple[Tensor, int]:
        """Return the slot's image, or the next good one of the epoch, and its sample number."""
        attempts = min(self.config.max_bad_samples + 1, self.order.slots)
        for ahead in range(attempts):
            sample = self.order.sample(epoch, slot + ahead)
            if (image := self.decode(sample, bad)) is not None:
                return image, sample
        shard, key, reason = bad[-1]
        raise DataError(
            f"{attempts} samples in a row are bad, the last is {key} in {shard}: {reason}. Repair these shards, then "
            "run the command again."
        )


class ValSamples(_Samples):
    """Central crops by sample number; the noise is a function of the sample's name."""

    def __getitems__(self, samples: Sequence[int]) -> ImageBatch:
        """Return the batch of these samples without the bad ones; it may be empty."""
        batch = _BatchBuilder(self.index, len(samples), self.spec)
        for sample in samples:
            if (image := self.decode(sample, batch.bad)) is None:
                continue
            height, width = image.shape[:2]
            box = central_box(height, width, self.spec.image_size, self.config.val_crop_pct)
            digest = hashlib.sha256(self.index.name(sample).encode(errors="replace")).digest()
            stream = generator(np.frombuffer(digest[:16], np.uint64), 0, 0)
            batch.add(sample, image, box, stream, flip=False)
        return batch.finish()


class _BatchBuilder:
    """Tensors of a batch, filled in place."""

    def __init__(self, index: ShardIndex, size: int, spec: BatchSpec) -> None:
        self.index = index
        self.images = torch.empty(size, *spec.image_size, spec.channels, dtype=torch.uint8)
        self.noise = torch.empty(size, spec.noise_length)
        self.samples: list[int] = []
        self.bad: list[BadSample] = []

    def add(self, sample: int, image: Tensor, box: Box, stream: np.random.Generator, flip: bool) -> None:
        row = len(self.samples)
        if image.dtype == self.images.dtype:
            crop_into(self.images[row], image, box, flip)
        else:  # cropped in its own dtype: its pixels must not depend on the rest of the batch
            crop = self.images.new_empty(self.images.shape[1:], dtype=image.dtype)
            crop_into(crop, image, box, flip)
            self.images = _to_unit(self.images)
            self.images[row] = _to_unit(crop)
        stream.random(dtype=np.float32, out=self.noise[row].numpy())
        self.samples.append(sample)

    def finish(self) -> ImageBatch:
        count = len(self.samples)
        return ImageBatch(
            images=self.images[:count].permute(0, 3, 1, 2),
            noise=self.noise[:count],
            keys=[self.index.name(sample) for sample in self.samples],
            labels=torch.from_numpy(self.index.table.labels[self.samples].astype(np.int64)),
            bad=self.bad,
        )


def _to_unit(pixels: Tensor) -> Tensor:
    """Return pixels as float32, uint8 divided by 255."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def train_loader(
    index: ShardIndex,
    config: DataConfig,
    spec: BatchSpec,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_steps: int,
) -> DataLoader[ImageBatch]:
    """Return a loader of one rank's micro-batches of steps start_step .. num_steps - 1, in order.

    An epoch has len(index) // repeats * repeats positions and drops the last partial global batch. Starting at a later
    step is a seek. Iterate once.

    Args:
        index, config, spec: The training samples and their batches.
        seed: Seed of order, crops, flips and noise; 0 or above.
        global_batch: Images of a step over all ranks and micro-batches.
        micro_batch: Images of one forward pass on one rank.
        rank, world_size: This process and the number of ranks.
        start_step, num_steps: Steps, counted from 0 over all epochs.

    Raises:
        ValueError: The batch does not split into micro-batches, or an epoch is shorter than a batch.
    """
    dataset = TrainSamples(index, config, spec, seed)
    if len(dataset.order) < global_batch:
        raise ConfigError(
            f"data.train has {len(dataset.order)} images per epoch with data.repeated_augmentation = "
            f"{config.repeated_augmentation}, fewer than one global batch of {global_batch}; use a smaller batch"
        )
    steps = range(start_step, num_steps)
    batches = StepBatches(len(dataset.order), global_batch, micro_batch, rank, world_size, steps)
    return batch_loader(dataset, batches, config.workers)


def val_loader(
    index: ShardIndex,
    config: DataConfig,
    spec: BatchSpec,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader[ImageBatch]:
    """Return a loader of one rank's validation samples; over all ranks it yields every sample once.

    The last batch is smaller, bad samples make batches smaller, and ranks may differ by one sample: sum losses and
    counts instead of averaging batch means. May be iterated repeatedly. `limit`: use this many samples, evenly
    spread over the data set.
    """
    count = len(index) if limit is None else min(limit, len(index))
    samples = [number * len(index) // count for number in range(rank, count, world_size)]
    batches = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    return batch_loader(ValSamples(index, config, spec, bounded_files=1), batches, config.workers)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x - mean) / std of (B, C, H, W) images, after uint8 is divided by 255.

    The result is float32 on the same device and in the same memory layout.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    unit = 255 if images.dtype == torch.uint8 else 1
    scale = 1 / (unit * torch.tensor(std, **options))
    shift = torch.tensor(mean, **options) * unit * scale
    return images.float() * scale[:, None, None] - shift[:, None, None]
