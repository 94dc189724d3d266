"""Index -> batches: images (B, C, H, W) and mask noise; their order is a function of (seed, epoch, position).

Position p of epoch e is the same pixels and the same noise whatever the numbers of workers and ranks are and wherever
a run began; see `moa_vision.epoch_order` and `moa_train.data_order`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moa_train.data_order import SAMPLE, StepBatches, batch_loader, generator, philox_key
from moa_train.errors import DataError
from moa_vision.cache import LostShard, is_kept
from moa_vision.epoch_order import EpochOrder
from moa_vision.images import CROP_DRAWS, Box, ImageError, central_box, crop_into, decode_image, random_box
from moa_vision.index import ShardIndex, ShardReader
from moa_vision.table import BadSample


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they become batches.

    Args:
        train: Training shards: a folder of scripts/make_shards.py, or tars by path, {brace}, glob, http(s)://,
            hf:// or pipe:command; several joined by "::".
        val: Validation shards, named likewise; none: no validation.
        image_key: The image among a sample's members: of KEY.input.jpg, input.jpg; several in order of preference,
            "input.jpg;jpg". Null: jpg, png, ..., or the only member with such a suffix. Of no use to shards of
            scripts/make_shards.py.
        shuffle_window_shards: Shards whose samples are shuffled together; reading stays within this many files.
        repeated_augmentation: Number of crops of each decoded image, at consecutive positions; an epoch reads
            1/repeated_augmentation of the images.
        crop_scale: Smallest and largest area of a training crop, as a fraction of the image.
        crop_ratio: Smallest and largest width / height of a training crop before it is resized.
        hflip: Mirror half of the training crops.
        val_crop_pct: Side of the central validation crop, as a fraction of the image's.
        mean: Of the normalization, per channel, of pixels in [0, 1], or one value for all channels. The default is
            ImageNet's; models with other than three channels get its average for each, as in timm.
        std: Of the normalization, given likewise.
        workers: Processes that decode images, per device; 0: none beside the training process.
        cache_dir: For indices and for remote or compressed shards; default ~/.cache/moa_vision.
        cache_gib: Limit of the remote or compressed shards kept there, in GiB; those that were not used for longest
            make room. Shards that are being fetched may come on top meanwhile. Null: no limit.
        max_bad_samples: Different unusable samples after which a run stops, and stops again if it is started again;
            so does a lost shard that has more.
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
        low, high = self.crop_scale
        allowed = {
            "image_key": (self.image_key is None or bool(self.image_key.strip(" .;")), "a name such as input.jpg"),
            "shuffle_window_shards": (self.shuffle_window_shards >= 1, "1 or more"),
            "repeated_augmentation": (self.repeated_augmentation >= 1, "1 or more"),
            "crop_scale": (0 < low <= high <= 1, "two fractions, 0 < smallest <= largest <= 1"),
            "crop_ratio": (0 < self.crop_ratio[0] <= self.crop_ratio[1], "two numbers, 0 < smallest <= largest"),
            "val_crop_pct": (0 < self.val_crop_pct <= 1, "a fraction, more than 0 and at most 1"),
            "mean": (len(self.mean) > 0, "a number for each channel"),
            "std": (min(self.std, default=0) > 0, "a positive number for each channel"),
            "workers": (self.workers >= 0, "0 or more"),
            "cache_gib": (self.cache_gib is None or self.cache_gib > 0, "more than 0, or null for no limit"),
            "max_bad_samples": (self.max_bad_samples >= 0, "0 or more"),
        }
        for field in fields(self):
            valid, what = allowed.get(field.name, (True, ""))
            if not valid:
                raise ValueError(f"data.{field.name} is {getattr(self, field.name)!r}; allowed: {what}")

    def for_channels(self, channels: int) -> "DataConfig":
        """Return this configuration with `channels` values in `mean` and `std`. Raises ValueError if neither fits."""
        fitted = {}
        for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            values = getattr(self, name)
            if values == default and channels != 3:
                values = (sum(default) / 3,)
            if len(values) not in (1, channels):
                raise ValueError(
                    f"data.{name} has {len(values)} values, but the model {channels} channels "
                    f"(model.encoder_args.in_chans); give {channels} values, or one for all channels"
                )
            fitted[name] = values if len(values) == channels else values * channels
        return replace(self, **fitted)


class ImageBatch(NamedTuple):
    """B images with the noise that orders their patches for masking.

    Attributes:
        images: (B, C, H, W), channels-last in memory; uint8, or float32 in units of the whole range where one sample
            has more than 8 bits (`moa_vision.images`).
        noise: (B, L) float32, uniform in [0, 1).
        keys: B sample names, SHARD/KEY; see `ShardIndex.name`.
        labels: (B,) int64, -1 where there is none.
        bad: samples that could not be used while the batch was made.
        failure: why nothing can follow, where that is so: the batch is cut short there, and is not to be used. What a
            worker raises would lose `bad` on its way; `moa_vision.bad_samples.BadSamples.good` raises it.
    """

    images: Tensor
    noise: Tensor
    keys: list[str]
    labels: Tensor
    bad: list[BadSample]
    failure: str = ""


class _NoGoodSample(DataError):
    """As many samples in a row as may be bad at all."""


class TrainSamples(Dataset[ImageBatch]):
    """Random crops by (epoch, position)."""

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        image_size: tuple[int, int],
        num_patches: int,
        seed: int,
        channels: int = 3,
    ) -> None:
        open_files = None if index.cache_limit is None else config.shuffle_window_shards
        self.reader = ShardReader(index, config.max_bad_samples, open_files)
        self.config = config
        self.image_size = image_size
        self.num_patches = num_patches
        self.channels = channels
        self.key = philox_key(seed, SAMPLE)
        self.order = EpochOrder(index.starts, seed, config.shuffle_window_shards, config.repeated_augmentation)

    def __getitems__(self, where: Sequence[tuple[int, int]]) -> ImageBatch:
        """The batch of these epochs and positions; images that several positions share are decoded once.

        Too many bad samples in a row are told by its `failure`.
        """
        batch = _Builder(self.reader.index, len(where), self.image_size, self.num_patches, self.channels)
        current, image, sample = None, torch.empty(0), -1
        for epoch, position in where:
            slot = position // self.config.repeated_augmentation
            if (epoch, slot) != current:
                current = (epoch, slot)
                try:
                    image, sample = self._image(epoch, slot, batch.bad)
                except _NoGoodSample as error:
                    return batch.done(str(error))
            stream = generator(self.key, epoch, position)
            draws = stream.random(CROP_DRAWS + 1)
            height, width = image.shape[:2]
            box = random_box(draws[1:], height, width, self.config.crop_scale, self.config.crop_ratio)
            batch.add(sample, image, box, stream, flip=self.config.hflip and bool(draws[0] < 0.5))
        return batch.done()

    def _image(self, epoch: int, slot: int, bad: list[BadSample]) -> tuple[Tensor, int]:
        """The slot's image, or the next good one of the epoch's order; and which sample that is."""
        allowed = min(self.config.max_bad_samples + 1, self.order.slots)
        for ahead in range(allowed):
            sample = self.order.sample(epoch, slot + ahead)
            try:
                image = decode_image(self.reader.read(sample), self.channels)
            except (ImageError, OSError, LostShard) as error:
                bad.append(self.reader.index.bad(sample, error))
            else:
                return image, sample
        shard, key, reason = bad[-1]
        raise _NoGoodSample(
            f"{allowed} samples in a row are bad, the last {key} in {shard}: {reason}. "
            "Make or fetch these shards again."
        )


class ValSamples(Dataset[ImageBatch]):
    """Central crops by sample number; the noise is a function of the sample's name (shard and key) alone."""

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        image_size: tuple[int, int],
        num_patches: int,
        channels: int = 3,
    ) -> None:
        open_files = None if index.cache_limit is None else 1
        self.reader = ShardReader(index, config.max_bad_samples, open_files)
        self.config = config
        self.image_size = image_size
        self.num_patches = num_patches
        self.channels = channels

    def __getitems__(self, samples: Sequence[int]) -> ImageBatch:
        """The batch of these samples, without those that are bad (it may be empty)."""
        index = self.reader.index
        batch = _Builder(index, len(samples), self.image_size, self.num_patches, self.channels)
        for sample in samples:
            try:
                image = decode_image(self.reader.read(sample), self.channels)
            except (ImageError, OSError, LostShard) as error:
                batch.bad.append(index.bad(sample, error))
                continue
            height, width = image.shape[:2]
            box = central_box(height, width, self.image_size, self.config.val_crop_pct)
            digest = hashlib.sha256(index.name(sample).encode(errors="replace")).digest()
            stream = generator(np.frombuffer(digest[:16], np.uint64), 0, 0)
            batch.add(sample, image, box, stream, flip=False)
        return batch.done()


class _Builder:
    """Fills a batch's tensors in place."""

    def __init__(
        self, index: ShardIndex, size: int, image_size: tuple[int, int], num_patches: int, channels: int
    ) -> None:
        self.index = index
        self.images = torch.empty(size, *image_size, channels, dtype=torch.uint8)
        self.noise = torch.empty(size, num_patches)
        self.samples: list[int] = []
        self.bad: list[BadSample] = []

    def add(self, sample: int, image: Tensor, box: Box, stream: np.random.Generator, flip: bool) -> None:
        row = len(self.samples)
        if image.dtype == self.images.dtype:
            crop_into(self.images[row], image, box, flip)
        else:  # cropped in its own dtype, so that the rest of the batch has no say in its pixels
            crop = self.images.new_empty(self.images.shape[1:], dtype=image.dtype)
            crop_into(crop, image, box, flip)
            self.images = _unit(self.images)
            self.images[row] = _unit(crop)
        stream.random(dtype=np.float32, out=self.noise[row].numpy())
        self.samples.append(sample)

    def done(self, failure: str = "") -> ImageBatch:
        count = len(self.samples)
        return ImageBatch(
            self.images[:count].permute(0, 3, 1, 2),
            self.noise[:count],
            [self.index.name(sample) for sample in self.samples],
            torch.from_numpy(self.index.table.labels[self.samples].astype(np.int64)),
            self.bad,
            failure,
        )


def _unit(pixels: Tensor) -> Tensor:
    """Pixels as float32 in units of their range."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def train_loader(
    index: ShardIndex,
    config: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    num_patches: int,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_steps: int,
) -> DataLoader[ImageBatch]:
    """One rank's micro-batches of the steps start_step .. num_steps - 1, in order: `ImageBatch`, B = micro_batch.

    An epoch has len(index) // repeats * repeats positions and drops the last partial global batch. Beginning at a
    step is a seek. Iterate once.

    Args:
        index: the training samples.
        config: crops, repeats, window, workers.
        image_size: height and width of the crops, in pixels.
        channels: C.
        num_patches: L, the length of the noise.
        seed: of order, crops, flips and noise; 0 or more.
        global_batch: images of a step, over all ranks and micro-batches.
        micro_batch: images of one forward on one rank.
        rank: of this process.
        world_size: number of ranks.
        start_step: first step, counted from 0 over all epochs.
        num_steps: the step to stop before.

    Raises:
        ValueError: if the batch does not split into micro-batches, or an epoch is shorter than a batch.
    """
    dataset = TrainSamples(index, config, image_size, num_patches, seed, channels)
    if len(dataset.order) < global_batch:
        raise ValueError(
            f"data.train has {len(dataset.order)} images per epoch with data.repeated_augmentation = "
            f"{config.repeated_augmentation}, fewer than one global batch of {global_batch}; use a smaller batch"
        )
    steps = range(start_step, num_steps)
    batches = StepBatches(len(dataset.order), global_batch, micro_batch, rank, world_size, steps)
    return batch_loader(dataset, batches, config.workers)


def val_loader(
    index: ShardIndex,
    config: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    num_patches: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader[ImageBatch]:
    """One rank's share of the validation samples, every sample exactly once over all ranks, as `ImageBatch`.

    The last batch is smaller, a bad sample makes its batch smaller, and ranks may differ by one sample: add up sums
    and counts, not means of batches. May be iterated again and again.

    Args:
        index: the validation samples.
        config: crop and workers.
        image_size: height and width of the crops, in pixels.
        channels: C.
        num_patches: L, the length of the noise.
        batch_size: images of a batch on one rank.
        rank: of this process.
        world_size: number of ranks.
        limit: use this many samples, evenly spread over the data set.
    """
    count = len(index) if limit is None else min(limit, len(index))
    samples = [number * len(index) // count for number in range(rank, count, world_size)]
    batches = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    return batch_loader(ValSamples(index, config, image_size, num_patches, channels), batches, config.workers)


def require_cache_room(config: DataConfig, train: ShardIndex, val: ShardIndex | None = None) -> None:
    """Raises ValueError if `data.cache_gib` is less than what is read at the same time.

    That is two windows of training shards, as some workers begin one before others have ended the last, and two
    validation shards.
    """
    if config.cache_gib is None:
        return
    needed = _largest(train, 2 * config.shuffle_window_shards) + (_largest(val, 2) if val else 0)
    if config.cache_gib * 2**30 < needed:
        raise ValueError(
            f"data.cache_gib is {config.cache_gib}; allowed: {needed / 2**30:.3g} or more, which two windows of "
            f"data.shuffle_window_shards = {config.shuffle_window_shards} of these shards take, or null for no limit"
        )


def _largest(index: ShardIndex, count: int) -> int:
    """Bytes of the `count` largest shards of those that are kept in the cache."""
    sizes = [size for shard, size in zip(index.shards, index.shard_bytes(), strict=True) if is_kept(shard.url)]
    return sum(sorted(sizes)[-count:])


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) -> float32, same device and memory layout: (x - mean) / std, after uint8 is divided by 255."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    unit = 255 if images.dtype == torch.uint8 else 1
    scale = 1 / (unit * torch.tensor(std, **options))
    shift = torch.tensor(mean, **options) * unit * scale
    return images.float() * scale[:, None, None] - shift[:, None, None]
