"""Shards whose every sample has a label, as batches for classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moa_train.data_order import to_main_process
from moa_train.schedule import Plan
from moa_train.signals import ignore_stop_signals
from moa_train.task import DataParallelRank
from moa_vision.bad_samples import BadSamples
from moa_vision.data import DataConfig, ImageBatch, require_cache_room, train_loader, val_loader
from moa_vision.index import ShardIndex, open_index
from moa_vision.probe.augment import SEED_NUMBERS, seed_of


class LabelledImages(NamedTuple):
    """What a classifier learns from.

    Attributes:
        images: (B, C, H, W) as `ImageBatch` has them.
        labels: (B,) int64.
        seed: Of the augmentations of the whole batch; None: there are none.
    """

    images: Tensor
    labels: Tensor
    seed: int | None = None


class LabelledData:
    """Training and held-out samples with their labels.

    Attributes:
        train, val: Their indices.
        num_classes: Labels are 0 ... num_classes - 1.

    Args:
        config: Where they are and how they become batches; `val` is not None.
        image_size: Height and width of the crops, in pixels.
        channels: C of the images.
        bad_samples: File that names the samples that could not be used.

    Raises:
        ValueError: a sample has no label, or held-out labels are not those of training; the message names them. Or
            `config.cache_gib` is less than what is read at the same time.
        DataError: a shard is missing or damaged.
    """

    def __init__(self, config: DataConfig, image_size: tuple[int, int], channels: int, bad_samples: Path) -> None:
        assert config.val is not None
        self.config, self.image_size, self.channels = config, image_size, channels
        kept = config.cache_dir, config.cache_gib, config.image_key
        self.train, self.val = open_labelled(config.train, *kept), open_labelled(config.val, *kept)
        require_cache_room(config, self.train, self.val)
        self.num_classes = max(len(self.train.label_names), int(self.train.table.labels.max()) + 1)
        self.bad_samples = BadSamples(bad_samples, config.max_bad_samples)
        self._check_classes()

    def _check_classes(self) -> None:
        """Raise ValueError where a held-out label means nothing, or something else, to who learned the others."""
        config, (names, others) = self.config, (self.train.label_names, self.val.label_names)
        if any(ours != theirs for ours, theirs in zip(names, others, strict=False)):
            raise ValueError(
                f"labels mean other classes in {config.val} ({', '.join(others[:3])}, ...) than in {config.train} "
                f"({', '.join(names[:3])}, ...); give training and held-out shards of the same classes"
            )
        strange = np.flatnonzero(self.val.table.labels >= self.num_classes)
        if len(strange):
            sample = self.val.bad(int(strange[0]), f"label {self.val.table.labels[strange[0]]}")
            raise ValueError(
                f"{sample.key} in {sample.shard} has {sample.reason}, but the labels of {config.train} end at "
                f"{self.num_classes - 1}; give held-out shards of the same classes"
            )

    def note_without_image(self) -> None:
        """Note the samples that have no image, which no batch tells of. Raises DataError for too many bad samples."""
        self.bad_samples.note([*self.train.without_image(), *self.val.without_image()])

    def centred(self, index: ShardIndex, share: DataParallelRank, limit: int | None = None) -> Iterable[ImageBatch]:
        """Return a process's share of an index (`train` or `val`) as central crops, each sample once, for `read`.

        It keeps its workers and may be read again and again. `limit` samples, evenly spread, are enough where it is
        given.
        """
        loader = val_loader(
            index,
            self.config,
            image_size=self.image_size,
            channels=self.channels,
            num_patches=1,
            batch_size=share.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            limit=limit,
        )
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def read(self, batches: Iterable[ImageBatch]) -> Iterator[LabelledImages]:
        """Yield images and labels of batches that nothing augments. Raises DataError for too many bad samples."""
        for batch in self.bad_samples.good(batches):
            yield LabelledImages(batch.images, batch.labels)

    def augmented(
        self,
        share: DataParallelRank,
        plan: Plan,
        start_step: int,
        seed: int,
        augment: Callable[[ImageBatch], ImageBatch] | None = None,
    ) -> Iterator[LabelledImages]:
        """Yield a process's random crops of the training samples, micro-batch after micro-batch from `start_step` on.

        What the crops' random numbers leave over seeds everything further: `augment`, which the loader's workers
        apply to their batches, and `LabelledImages.seed`. So no worker and no device has a say in it.
        """
        loader = train_loader(
            self.train,
            self.config,
            image_size=self.image_size,
            channels=self.channels,
            num_patches=SEED_NUMBERS,
            seed=seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            start_step=start_step,
            num_steps=plan.total_steps,
        )
        loader.worker_init_fn = ignore_stop_signals
        if augment is not None:
            loader.collate_fn = partial(to_main_process, augment=augment)  # pyright: ignore[reportAttributeAccessIssue]  (torch infers its default's type)
        if share.rank == 0:
            self.note_without_image()
        for batch in self.bad_samples.good(loader):
            yield LabelledImages(batch.images, batch.labels, seed_of(batch.noise.flatten()))


def open_labelled(
    pattern: str, cache_dir: str | None, cache_gib: float | None, image_key: str | None = None
) -> ShardIndex:
    """Return the index of shards in which every sample has a label; arguments as in `open_index`.

    Raises:
        ValueError: one has none; the message names its shard and key.
        DataError: a shard is missing or damaged.
    """
    index = open_index(pattern, cache_dir, cache_gib, image_key)
    unlabelled = np.flatnonzero(index.table.labels < 0)
    if len(unlabelled):
        sample = index.bad(int(unlabelled[0]), "no label")
        raise ValueError(
            f"{sample.key} in {sample.shard} has no label, nor have {len(unlabelled) - 1:,} others of the "
            f"{len(index):,} samples of {pattern}; a probe needs KEY.cls beside every image (scripts/make_shards.py "
            "writes them from the names of folders), or other shards: --train and --val"
        )
    return index
