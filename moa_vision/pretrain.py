"""Masked-autoencoder pre-training: configuration, the task that `moa_train.trainer` runs, and the main."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from moa_train.config import RESUME_MUTABLE_KEYS, EpochSchedule, RunConfig, parse_config
from moa_train.errors import DataError, require
from moa_train.progress import count
from moa_train.schedule import Budget, Plan
from moa_train.signals import ignore_stop_signals
from moa_train.task import DataParallelRank, Task
from moa_train.trainer import check, run
from moa_vision.bad_samples import BadSamples
from moa_vision.data import DataConfig, ImageBatch, normalize, require_cache_room, train_loader, val_loader
from moa_vision.export import export_encoder
from moa_vision.index import ShardIndex, open_index
from moa_vision.mae import MAE, create_mae, forward_flops, parameter_counts
from moa_vision.mixing import mixing_maps, save_mixing
from moa_vision.photographs import make_photograph_shards
from moa_vision.reconstruct import save_reconstructions

DATA_RESUME_MUTABLE_KEYS = {"data.workers", "data.cache_dir", "data.cache_gib", "data.max_bad_samples"}
"""Keys of the data that may change when a run is resumed."""

PHOTOGRAPHS = Path("data/photographs")
"""Shards of the laptop configs; packed from scikit-image's and scikit-learn's photographs when they are missing."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The masked autoencoder.

    Args:
        encoder: timm name of the encoder; its last part is the FFN, e.g. vit_base_patch16_qdmoa.
        img_size: Side of the images in pixels, or [height, width]; the patch size divides it.
        encoder_args: More arguments of the encoder, e.g. {depth: 6, patch_size: 8, drop_path_rate: 0.1}; ffn_* too.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        decoder_ffn: FFN variant of the decoder; null is the encoder's.
        mask_ratio: Part of the patches that is masked.
        norm_pix_loss: Predict patches normalized to mean 0 and variance 1, rather than pixels.
    """

    encoder: str = "vit_base_patch16_qdmoa"
    img_size: int | tuple[int, int] = 224
    encoder_args: dict[str, Any] = field(default_factory=dict)
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_ffn: str | None = None
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("model.mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "between 0 and 1")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            require(f"model.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or above")


@dataclass(frozen=True, kw_only=True)
class MAEConfig(RunConfig):
    """A run of masked-autoencoder pre-training.

    Args:
        model: The masked autoencoder.
        data: Where the images are and how they become batches.
        schedule: How long, in what batches, at what rate.
    """

    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig


class Images(NamedTuple):
    """What the loss takes: images (B, C, H, W), noise (B, L) and names, as `moa_vision.data.ImageBatch` has them."""

    images: Tensor
    noise: Tensor
    keys: tuple[str, ...] = ()


class MAETask(Task):
    """A `moa_train.task.Task`: the masked autoencoder on shards of images.

    Raises:
        ValueError: the model or the data cannot be what the configuration says.
        DataError: a shard is missing or damaged, or too many samples are.
    """

    unit = "img"
    counter = "samples"
    units_per_sample = 1
    val_names: tuple[str, ...] = ("loss", "loss_norm", "loss_pixel")
    best_by = "loss_norm"

    def __init__(self, config: MAEConfig) -> None:
        self.config = config
        self.mae = build_mae(config.model)
        self.data = config.data.for_channels(self.mae.in_chans)
        self.model: nn.Module = self.mae
        self.image_size = (self.mae.grid_size[0] * self.mae.patch_size, self.mae.grid_size[1] * self.mae.patch_size)
        self.train_index = self._opened("train", self.data.train)
        self.val_index = self._opened("val", self.data.val) if self.data.val else None
        require_cache_room(self.data, self.train_index, self.val_index)
        self.samples_per_epoch = (
            len(self.train_index) // self.data.repeated_augmentation * self.data.repeated_augmentation
        )
        held_out = len(self.val_index) if self.val_index else 0
        self.val_samples = held_out if config.loop.val_samples is None else min(held_out, config.loop.val_samples)
        self.forward_flops_per_sample = forward_flops(self.mae)
        self.bad_samples = BadSamples(config.folder / "bad_samples.jsonl", self.data.max_bad_samples)
        self._val_loader: Iterable[ImageBatch] | None = None

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the steps that the configured epochs come to."""
        return self.config.schedule.budget(steps_per_epoch)

    def startup_lines(self) -> dict[str, str]:
        """Return lines of the announcement."""
        mae, index = self.mae, self.train_index
        parts = [f"{name} {count(number)}" for name, number in parameter_counts(mae).items()]
        size = " x ".join(map(str, self.image_size))
        return {
            "model": f"{self.config.model.encoder} at {size}; sees {mae.num_visible} of {mae.num_patches} patches",
            "parameters": ", ".join(parts),
            "data": f"{len(index):,} images in {len(index.shards):,} shards; {self.val_samples:,} held out",
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts and the number of bad samples, for summary.json."""
        return {"parameters": parameter_counts(self.mae), "bad_samples": self.bad_samples.recorded()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that are not weights."""
        return self.mae.no_weight_decay()

    def example_batch(self, count: int) -> Images:
        """Return a made-up batch."""
        images = torch.zeros(count, self.mae.in_chans, *self.image_size, dtype=torch.uint8)
        return Images(images, torch.linspace(0, 1, self.mae.num_patches).expand(count, -1))

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[Images]:
        """Yield this process's micro-batches from `start_step` on."""
        loader = train_loader(
            self.train_index,
            self.data,
            image_size=self.image_size,
            channels=self.mae.in_chans,
            num_patches=self.mae.num_patches,
            seed=self.config.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            start_step=start_step,
            num_steps=plan.total_steps,
        )
        loader.worker_init_fn = ignore_stop_signals
        if share.rank == 0:
            for index in filter(None, (self.train_index, self.val_index)):
                self.bad_samples.note(index.without_image())
        return self._good(loader)

    def val_batches(self, share: DataParallelRank) -> Iterable[Images]:
        """Yield this process's share of the held-out images; masks are fixed for each image."""
        if self._val_loader is None:
            self._val_loader = self._held_out(self.data, share, self.val_samples)
        return self._good(self._val_loader)

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        """Return the mean loss of a micro-batch."""
        return model(self._normalized(batch.images), batch.noise).loss

    def sample_names(self, batch: Images) -> list[str]:
        """Return the names of the batch's images, SHARD/KEY."""
        return list(batch.keys)

    def identity(self) -> dict[str, Any]:
        """Return checksums of the samples."""
        indices = {"train": self.train_index, "val": self.val_index}
        own = {part: index.identity() for part, index in indices.items() if index is not None}
        return {f"{part} {of}": checksum for part, sums in own.items() for of, checksum in sums.items()}

    def val_losses(self, model: nn.Module, batch: Images) -> dict[str, Tensor]:
        """Return each image's loss (the trained one), loss_norm and loss_pixel."""
        images = self._normalized(batch.images)
        losses = self.mae.reconstruction_losses(images, model(images, batch.noise))
        return losses | {"loss": losses["loss_norm" if self.mae.norm_pix_loss else "loss_pixel"]}

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Draw the same few held-out images, masked and reconstructed, each time, and note how their tokens mix."""
        if self._shown is None:
            return
        assert isinstance(model, MAE)
        images, noise, keys = self._shown
        images, noise = (tensor.to(next(model.parameters()).device) for tensor in (images, noise))
        images = self._normalized(images)
        maps = mixing_maps(model, images, noise)
        save_mixing(maps, keys, model.grid_size, folder / "mixing", step=step)
        save_reconstructions(
            model,
            images,
            noise,
            keys,
            folder / "reconstructions",
            step=step,
            mean=self.data.mean,
            std=self.data.std,
        )

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder for timm, and the whole autoencoder beside it."""
        assert isinstance(model, MAE)
        export_encoder(model, folder, self.data.mean, self.data.std)

    @cached_property
    def _shown(self) -> tuple[Tensor, Tensor, list[str]] | None:
        """The images (N, C, H, W), noise (N, L) and keys that `write_diagnostics` draws; None without held-out ones."""
        shown = min(self.val_samples, self.config.loop.num_diagnostic_samples)
        for batch in (
            self._held_out(replace(self.data, workers=0), DataParallelRank(0, 1, shown), shown) if shown else ()
        ):
            return batch.images, batch.noise, batch.keys
        return None

    def _opened(self, key: str, pattern: str) -> ShardIndex:
        try:
            return open_index(pattern, self.data.cache_dir, self.data.cache_gib, self.data.image_key)
        except DataError:
            raise
        except (OSError, RuntimeError) as error:  # a path that cannot be: too long, or in the home of nobody
            raise ValueError(
                f"data.{key} is {pattern!r}, data.cache_dir {self.data.cache_dir!r}: they cannot be read ({error})"
            ) from error

    def _held_out(self, data: DataConfig, share: DataParallelRank, limit: int) -> Iterable[ImageBatch]:
        assert self.val_index is not None, "asked for only where val_samples is above 0"
        loader = val_loader(
            self.val_index,
            data,
            image_size=self.image_size,
            channels=self.mae.in_chans,
            num_patches=self.mae.num_patches,
            batch_size=share.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            limit=limit,
        )
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def _good(self, batches: Iterable[ImageBatch]) -> Iterator[Images]:
        """Pass on what can be used, and keep count of what cannot."""
        for batch in self.bad_samples.good(batches):
            yield Images(batch.images, batch.noise, tuple(batch.keys))

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.data.mean, self.data.std)


def build_mae(config: ModelConfig) -> MAE:
    """Return the masked autoencoder of a configuration, initialized from torch's generator. Raises ValueError."""
    return create_mae(
        config.encoder,
        img_size=config.img_size,
        encoder_args=config.encoder_args,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        decoder_ffn=config.decoder_ffn,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )


def build_task(config: MAEConfig) -> MAETask:
    """Return the task; where it wants the demo's photographs and they are missing, make their shards first."""
    if photographs_are_missing(config.data):
        make_photographs(config.data)
    return MAETask(config)


def make_photographs(data: DataConfig) -> None:
    """Make the demo's shards; of several runs that start at the same time (a sweep's), one does and the rest wait."""
    PHOTOGRAPHS.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{PHOTOGRAPHS}.lock"):
        if not photographs_are_missing(data):
            return
        print(f"packing the photographs of scikit-image and scikit-learn into {PHOTOGRAPHS}")
        make_photograph_shards(PHOTOGRAPHS)


def photographs_are_missing(data: DataConfig) -> bool:
    """Whether the data are the demo's photographs, whose shards `build_task` has yet to make."""
    wanted = {Path(pattern) for pattern in (data.train, data.val) if pattern}
    return any(path.parent == PHOTOGRAPHS and not (path / "manifest.json").exists() for path in wanted)


def check_config(config: MAEConfig) -> None:
    """Raise ValueError for a model that cannot be built, data that are not there, or a batch that cannot be."""
    if photographs_are_missing(config.data):
        with torch.device("meta"):
            build_mae(config.model)
        return
    try:
        check(config, partial(MAETask, config))
    except DataError as error:
        raise ValueError(str(error)) from error


def main(arguments: Sequence[str] | None = None, *, default: Path | None = None) -> int:
    """Train as the command line says and return the exit code of `moa_train.trainer.run`; `default` is the config file
    read when the command line names none.
    """
    config = parse_config(
        MAEConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="pretrain_mae.py",
        summary="Pre-train a masked autoencoder. The same command continues a run that was stopped.",
        default=default,
        check=check_config,
    )
    return run(
        config,
        partial(build_task, config),
        mutable_keys=RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS,
    )
