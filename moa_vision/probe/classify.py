"""Classifiers around a pre-trained encoder as tasks of `moa_train.trainer`: MAE's linear probe and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn

from moa_train.config import OptimConfig
from moa_train.errors import DataError, require
from moa_train.optim import FUSED_DEVICES
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD
from moa_train.progress import count
from moa_vision.data import BatchSpec, DataConfig, ImageBatch
from moa_vision.image_task import ImageRun, ImageTask
from moa_vision.index import ShardIndex, open_index
from moa_vision.probe.augment import SEED_NUMBERS, BatchRandAugment, MixingAugment, seed_from
from moa_vision.probe.config import FinetuneConfig, LinearConfig
from moa_vision.probe.encoders import TrainedEncoder, pooling_arguments
from moa_vision.vit import constant_coefficients, flops_per_image


class LabelledShards(NamedTuple):
    """Training and held-out samples with labels 0 ... num_classes - 1."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int


def open_labelled(data: DataConfig) -> LabelledShards:
    """Open the training and held-out shards of a probe; `data.val` must be set.

    Raises:
        DataError: A shard is missing or damaged, a sample has no label, or the classes of both sets differ.
    """
    assert data.val is not None
    train, val = (_open_part(pattern, data) for pattern in (data.train, data.val))
    if any(ours != theirs for ours, theirs in zip(train.label_names, val.label_names, strict=False)):
        raise DataError(
            f"labels stand for other classes in {data.val} ({', '.join(val.label_names[:3])}, ...) than in "
            f"{data.train} ({', '.join(train.label_names[:3])}, ...); give shards with the same classes"
        )
    num_classes = max(len(train.label_names), int(train.table.labels.max()) + 1)
    unknown = np.flatnonzero(val.table.labels >= num_classes)
    if len(unknown):
        sample = val.bad(int(unknown[0]), f"label {val.table.labels[unknown[0]]}")
        raise DataError(
            f"{sample.key} in {sample.shard} has {sample.reason}, but the largest label in {data.train} is "
            f"{num_classes - 1}; give shards with the same classes"
        )
    return LabelledShards(train, val, num_classes)


def _open_part(pattern: str, data: DataConfig) -> ShardIndex:
    index = open_index(pattern, data.cache_dir, data.cache_gib, data.image_key)
    unlabelled = np.flatnonzero(index.table.labels < 0)
    if len(unlabelled):
        sample = index.bad(int(unlabelled[0]), "no label")
        raise DataError(
            f"{sample.key} in {sample.shard} and {len(unlabelled) - 1:,} other samples of {pattern} have no label; "
            "a probe needs a KEY.cls for every image (scripts/make_shards.py writes it from folder names): give "
            "other shards with --train and --val"
        )
    return index


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(ImageRun):
    """Configuration of one classifier training, as stored in its run folder.

    Args:
        method: linear or finetune.
        recipe: Recipe, from which `optim` and `schedule` are derived.
        encoder: `TrainedEncoder.identity`.
    """

    method: Literal["linear", "finetune"]
    recipe: LinearConfig | FinetuneConfig
    encoder: dict[str, Any] = field(default_factory=dict)


class Classifier(ImageTask):
    """Base of both tasks; subclasses add model, optimizer, loss and export."""

    val_names: tuple[str, ...] = ("loss", "error", "error_top5")
    best_by = "error"

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        self.encoder = encoder
        train, val, self.num_classes = open_labelled(config.data)
        spec = BatchSpec(encoder.image_size, SEED_NUMBERS, encoder.channels)
        super().__init__(config, config.data, train, val, spec)
        batch, samples = config.recipe.batch_size, self.samples_per_epoch
        require(f"{config.method}.batch_size", batch, batch <= samples, f"at most the {samples} training samples")

    def startup_lines(self) -> dict[str, str]:
        """Return lines that describe encoder and data at startup."""
        index, parameters = self.train_index, self.summary_fields()["parameters"]
        step = "" if self.encoder.step is None else f", step {self.encoder.step:,}"
        images = f"{len(index):,} images in {len(index.shards):,} shards, {self.num_classes:,} classes"
        return {
            "encoder": f"{self.encoder.config['architecture']} from {self.encoder.folder}{step}",
            "parameters": ", ".join(f"{name} {count(number)}" for name, number in parameters.items()),
            "data": f"{images}; {self.val_samples:,} held out",
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts and the number of bad samples."""
        parameters = list(self.model.parameters())
        return {
            "parameters": {
                "total": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "bad_samples": self.bad_samples.recorded(),
        }

    def val_losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """Return cross-entropy, top-1 error and top-5 error of each image, (B,) each."""
        logits = model(self.normalized(batch.images)).float()
        top = logits.topk(min(5, self.num_classes), dim=1).indices == batch.labels[:, None]
        return {
            "loss": F.cross_entropy(logits, batch.labels, reduction="none"),
            "error": 1 - top[:, 0].float(),
            "error_top5": 1 - top.any(dim=1).float(),
        }

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write nothing."""


class LinearProbe(nn.Module):
    """Frozen encoder, batch normalization without parameters, and a linear layer on its `features` outputs."""

    def __init__(self, encoder: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6)
        self.head = nn.Linear(features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode of all modules except the encoder."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W)."""
        with torch.no_grad():
            features = self.encoder(images)
        return self.head(self.norm(features.float()))

    def folded_head(self) -> tuple[Tensor, Tensor]:
        """Return weight (num_classes, D) and bias (num_classes,) of one linear layer for normalization and head."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        weight = self.head.weight / (variance + self.norm.eps).sqrt()
        return weight, self.head.bias - weight @ mean


class LinearTask(Classifier):
    """Linear probe with MAE's LARS."""

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        super().__init__(config, encoder)
        assert isinstance(config.recipe, LinearConfig)
        self.recipe = config.recipe
        features = encoder.features(self.recipe.pool)
        self.probe = LinearProbe(features, features.num_features, self.num_classes)
        self.model: nn.Module = self.probe.eval()  # until training starts, so that measuring costs keeps the statistics
        # The trainer multiplies by 3 for the backward pass, but the frozen encoder has none.
        flops = flops_per_image(self.model, (encoder.channels, *encoder.image_size))
        self.forward_flops_per_sample = round(flops / TRAINING_FLOPS_PER_FORWARD)

    def optimizer(self, config: OptimConfig) -> Lars:
        """Return LARS over the linear layer."""
        return lars(self.probe.head, config.lr, config.weight_decay, self.recipe.momentum)

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, ()."""
        return F.cross_entropy(model(self.normalized(batch.images)).float(), batch.labels)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write encoder and head as one timm classifier."""
        assert isinstance(model, LinearProbe)
        weight, bias = model.folded_head()
        state = {**model.encoder.state_dict(), "head.weight": weight, "head.bias": bias}
        self.encoder.export_classifier(state, self.num_classes, folder, **pooling_arguments(self.recipe.pool))


class FinetuneTask(Classifier):
    """Fine-tuning of the whole encoder with AdamW and layer-wise learning rate decay."""

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        super().__init__(config, encoder)
        assert isinstance(config.recipe, FinetuneConfig)
        self.recipe = recipe = config.recipe
        self.vit = encoder.load(num_classes=self.num_classes, global_pool="avg", drop_path_rate=recipe.drop_path)
        assert isinstance(self.vit.head, nn.Linear)
        nn.init.trunc_normal_(self.vit.head.weight, std=2e-5)  # as in MAE
        nn.init.zeros_(self.vit.head.bias)
        self.model: nn.Module = self.vit.eval()  # until training starts, as in `LinearTask`
        self.forward_flops_per_sample = flops_per_image(self.model, (encoder.channels, *encoder.image_size))
        if recipe.rand_augment:
            self.augment = BatchRandAugment(recipe.rand_augment, encoder.image_size, config.data.mean)
        self.mixing = MixingAugment(
            self.num_classes,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            smoothing=recipe.smoothing,
            erase=recipe.erase,
        )
        self.soft_cross_entropy = SoftTargetCrossEntropy()

    def optimizer(self, config: OptimConfig) -> torch.optim.AdamW:
        """Return AdamW over `layer_groups`."""
        groups = layer_groups(self.vit, config.weight_decay, self.recipe.layer_decay)
        fused = config.fused and groups[0]["params"][0].device.type in FUSED_DEVICES
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return the mean cross-entropy of a micro-batch with mixed, smoothed targets, ()."""
        seed = seed_from(batch.noise) if self.vit.training else None
        images, targets = self.mixing(self.normalized(batch.images), batch.labels, seed)
        return self.soft_cross_entropy(model(images).float(), targets)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the classifier as a timm checkpoint."""
        self.encoder.export_classifier(model.state_dict(), self.num_classes, folder, global_pool="avg")


def layer_groups(model: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return timm's parameter groups with layer-wise learning rates, each {"params", "weight_decay", "lr_scale"}.

    The embedding is layer 0, block i layer i + 1 and everything after the blocks layer depth + 1. Layer l has the
    scale layer_decay ** (depth + 1 - l), as in MAE (util/lr_decay.py) and BEiT. Vectors, positions, class token and
    constant mixing coefficients get no weight decay.
    """
    no_decay = constant_coefficients(model) | set(model.no_weight_decay())
    return param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)


def lars(head: nn.Linear, lr: float, weight_decay: float, momentum: float) -> Lars:
    """Return timm's LARS with the settings of MAE's (util/lars.py): updates of the bias are not adapted to its norm."""
    weight = {"params": [head.weight], "weight_decay": weight_decay, "always_adapt": True}
    bias = {"params": [head.bias], "weight_decay": 0.0, "always_adapt": False}
    return Lars([group | {"momentum": momentum} for group in (weight, bias)], lr=lr)
