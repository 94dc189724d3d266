"""Base of the training tasks on image shards: pre-training and classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moa_train.config import EpochSchedule, RunConfig
from moa_train.data_order import to_main_process
from moa_train.schedule import Budget, Plan
from moa_train.signals import ignore_stop_signals
from moa_train.task import DataParallelRank, Task
from moa_vision.bad_samples import BadSamples
from moa_vision.data import BatchSpec, DataConfig, ImageBatch, normalize, train_loader, val_loader
from moa_vision.index import ShardIndex

DATA_RESUME_MUTABLE_KEYS = {"data.workers", "data.cache_dir", "data.cache_gib", "data.max_bad_samples"}
"""Data keys that may change when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class ImageRun(RunConfig):
    """A training run on images.

    Args:
        data: Images and their loading.
        schedule: Length, batch size and learning rate.
    """

    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    data: DataConfig


class ImageTask(Task):
    """Data side of a `moa_train.task.Task` on images; subclasses add model, losses and export.

    Args:
        config: The run.
        data: Its data, with normalization for the model's channels.
        train, val: Training and held-out samples.
        spec: Shape of a batch.
    """

    model: nn.Module
    unit = "img"
    counter = "samples"
    units_per_sample = 1
    augment: Callable[[ImageBatch], ImageBatch] | None = None
    """Augmentation of training batches, applied in the loader's workers."""

    def __init__(
        self,
        config: ImageRun,
        data: DataConfig,
        train: ShardIndex,
        val: ShardIndex | None,
        spec: BatchSpec,
    ) -> None:
        self.config, self.data, self.train_index, self.val_index, self.spec = config, data, train, val, spec
        self.samples_per_epoch = len(train) // data.repeated_augmentation * data.repeated_augmentation
        held_out, limit = len(val) if val else 0, config.loop.val_samples
        self.val_samples = held_out if limit is None else min(held_out, limit)
        self.bad_samples = BadSamples(config.folder / "bad_samples.jsonl", data.max_bad_samples)
        self._val_loader: DataLoader[ImageBatch] | None = None

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the number of steps and warm-up steps."""
        return self.config.schedule.budget(steps_per_epoch)

    def example_batch(self, count: int) -> ImageBatch:
        """Return a batch of black images, to measure memory and FLOPs."""
        images = torch.zeros(count, self.spec.channels, *self.spec.image_size, dtype=torch.uint8)
        noise = torch.linspace(0, 1, self.spec.noise_length).expand(count, -1)
        return ImageBatch(images, noise, [], torch.zeros(count, dtype=torch.int64), [])

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[ImageBatch]:
        """Yield this rank's micro-batches from `start_step` on."""
        loader = train_loader(
            self.train_index,
            self.data,
            self.spec,
            seed=self.config.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            start_step=start_step,
            num_steps=plan.total_steps,
        )
        loader.worker_init_fn = ignore_stop_signals
        if self.augment is not None:
            loader.collate_fn = partial(to_main_process, augment=self.augment)  # pyright: ignore[reportAttributeAccessIssue]  # torch infers the default's type
        if share.rank == 0:
            for index in filter(None, (self.train_index, self.val_index)):
                self.bad_samples.note(index.without_image())  # samples that no batch reports
        return self.bad_samples.good(loader)

    def val_batches(self, share: DataParallelRank) -> Iterable[ImageBatch]:
        """Yield this rank's held-out images as central crops; the noise of each image is fixed."""
        if self._val_loader is None:  # kept, and its workers with it, for the next validation
            self._val_loader = self.held_out_loader(self.data, share, self.val_samples)
        return self.bad_samples.good(self._val_loader)

    def held_out_loader(self, data: DataConfig, share: DataParallelRank, limit: int) -> DataLoader[ImageBatch]:
        """Return a loader over this rank's part of `limit` held-out samples."""
        assert self.val_index is not None
        loader = val_loader(
            self.val_index,
            data,
            self.spec,
            batch_size=share.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            limit=limit,
        )
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def sample_names(self, batch: ImageBatch) -> list[str]:
        """Return the names of a batch's images, SHARD/KEY."""
        return batch.keys

    def identity(self) -> dict[str, Any]:
        """Return checksums of the samples; a run resumes on the same samples only."""
        indices = {"train": self.train_index} | ({"val": self.val_index} if self.val_index else {})
        return {f"{part} {name}": value for part, index in indices.items() for name, value in index.identity().items()}

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) float32 with the data's mean and deviation removed."""
        return normalize(images, self.data.mean, self.data.std)
