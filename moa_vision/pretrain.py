"""MAE pre-training: configuration, the task for `moa_train.trainer`, and the command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moa_train.config import RESUME_MUTABLE_KEYS, parse_config
from moa_train.errors import DataError
from moa_train.evaluators import Factory
from moa_train.initialization import init_by_name
from moa_train.progress import count
from moa_train.task import DataParallelRank
from moa_train.trainer import check, run
from moa_vision.data import BatchSpec, DataConfig, ImageBatch
from moa_vision.diagnostics import mixing_maps, save_mixing, save_reconstructions
from moa_vision.export import export_encoder, load_weights
from moa_vision.image_task import DATA_RESUME_MUTABLE_KEYS, ImageRun, ImageTask
from moa_vision.index import ShardIndex, open_index
from moa_vision.mae import MAE, create_mae, forward_flops, parameter_counts

PHOTOGRAPHS = Path("data/photographs")
"""Shards of the laptop configs, made by `python -m moa_vision.photographs`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The masked autoencoder.

    Args:
        encoder: timm name of the encoder; its last part is the FFN, e.g. vit_base_patch16_qdmoa.
        img_size: Image size in pixels, one number or [height, width]; a multiple of the patch size.
        encoder_args: Further arguments of the encoder, e.g. {depth: 6, patch_size: 8, drop_path_rate: 0.1}; ffn_* too.
        decoder_dim: Decoder width.
        decoder_depth: Number of decoder blocks.
        decoder_heads: Attention heads of the decoder.
        decoder_ffn: FFN variant of the decoder; null uses the encoder's.
        mask_ratio: Fraction of masked patches.
        norm_pix_loss: Predict patches normalized to mean 0 and variance 1 instead of pixels.
        init_from: Folder with weights to start from: an export, or one of `python -m moa_vision.convert`.
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
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class MAEConfig(ImageRun):
    """Configuration of a pre-training run.

    Args:
        model: The masked autoencoder.
    """

    model: ModelConfig = field(default_factory=ModelConfig)


class MAETask(ImageTask):
    """Masked autoencoder on image shards.

    Raises:
        ConfigError: The model or data configuration is invalid.
        DataError: Shards are missing or damaged.
    """

    config: MAEConfig
    val_names: tuple[str, ...] = ("loss", "loss_norm", "loss_pixel")
    best_by = "loss_norm"

    def __init__(self, config: MAEConfig) -> None:
        self.mae = build_mae(config.model)
        init_by_name(self.mae, config.seed, self.mae.init_module)
        if config.model.init_from is not None and not next(self.mae.parameters()).is_meta:
            load_weights(self.mae, config.model.init_from)
        self.model: nn.Module = self.mae
        super().__init__(
            config,
            config.data.for_channels(self.mae.in_chans),
            _open_shards("train", config.data.train, config.data),
            _open_shards("val", config.data.val, config.data) if config.data.val else None,
            BatchSpec(self.mae.image_size, self.mae.num_patches, self.mae.in_chans),
        )
        self.forward_flops_per_sample = forward_flops(self.mae)

    def startup_lines(self) -> dict[str, str]:
        """Return lines that describe model and data at startup."""
        mae, index = self.mae, self.train_index
        size = " x ".join(map(str, mae.image_size))
        return {
            "model": f"{self.config.model.encoder} at {size}; sees {mae.num_visible} of {mae.num_patches} patches",
            "parameters": ", ".join(f"{name} {count(number)}" for name, number in parameter_counts(mae).items()),
            "data": f"{len(index):,} images in {len(index.shards):,} shards; {self.val_samples:,} held out",
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts and the number of bad samples."""
        return {"parameters": parameter_counts(self.mae), "bad_samples": self.bad_samples.recorded()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        return self.mae.no_weight_decay()

    def hidden_matrices(self) -> set[str]:
        """Return the names of the parameters that Muon steps."""
        return self.mae.hidden_matrices()

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return the mean loss of a micro-batch, ()."""
        return model(self.normalized(batch.images), batch.noise).loss

    def val_losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """Return loss (the training loss), loss_norm and loss_pixel of each image, (B,) each."""
        images = self.normalized(batch.images)
        losses = self.mae.reconstruction_losses(images, model(images, batch.noise))
        return losses | {"loss": losses["loss_norm" if self.mae.norm_pix_loss else "loss_pixel"]}

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write mixing maps and reconstructions of a few held-out images, the same ones each time."""
        batch = self._diagnostic_batch
        if batch is None:
            return
        assert isinstance(model, MAE)
        device = next(model.parameters()).device
        images, noise = self.normalized(batch.images.to(device)), batch.noise.to(device)
        save_mixing(mixing_maps(model, images, noise), batch.keys, model.grid_size, folder / "mixing", step=step)
        normalization = {"mean": self.data.mean, "std": self.data.std}
        save_reconstructions(model, images, noise, batch.keys, folder / "reconstructions", step=step, **normalization)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the encoder as a timm checkpoint, and the whole MAE."""
        assert isinstance(model, MAE)
        export_encoder(model, folder, self.data.mean, self.data.std)

    @cached_property
    def _diagnostic_batch(self) -> ImageBatch | None:
        """Held-out images for `write_diagnostics`; None without held-out data."""
        count = min(self.val_samples, self.config.loop.num_diagnostic_samples)
        if not count:
            return None
        return next(iter(self.held_out_loader(replace(self.data, workers=0), DataParallelRank(0, 1, count), count)))


def _open_shards(key: str, pattern: str, data: DataConfig) -> ShardIndex:
    if Path(pattern).parent == PHOTOGRAPHS and not Path(pattern, "manifest.json").exists():
        command = f"python -m moa_vision.photographs --out {PHOTOGRAPHS}"
        raise DataError(f"data.{key} is {pattern}, the data of the demo, which is missing; make it with: {command}")
    return open_index(pattern, data.cache_dir, data.cache_gib, data.image_key)


def build_mae(config: ModelConfig) -> MAE:
    """Return the MAE of a configuration, with weights from torch's generator."""
    arguments = {name: value for name, value in vars(config).items() if name != "init_from"}
    return create_mae(arguments.pop("encoder"), **arguments)


def main(
    arguments: Sequence[str] | None = None,
    *,
    default: Path | None = None,
    evaluators: Mapping[str, Factory] | None = None,
) -> int:
    """Train as the command line says and return the exit code of `moa_train.trainer.run`.

    Args:
        arguments: Command line without the program's name; None uses `sys.argv`.
        default: Config file that is read when the command line has none.
        evaluators: What the config's `evaluators` can name.
    """
    config = parse_config(
        MAEConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="pretrain_mae.py",
        summary="Pre-train a masked autoencoder. The same command resumes a stopped run.",
        default=default,
        check=lambda config: check(config, partial(MAETask, config), evaluators),
    )
    mutable_keys = RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS
    return run(config, partial(MAETask, config), mutable_keys=mutable_keys, evaluators=evaluators)
