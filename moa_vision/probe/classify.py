"""A classifier around a trained encoder, as a task of `moa_train.trainer`: the linear probe and fine-tuning of MAE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moa_train.config import EpochSchedule, OptimConfig, RunConfig
from moa_train.errors import require
from moa_train.optim import FUSED_DEVICES
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD
from moa_train.progress import count
from moa_train.schedule import Budget, Plan
from moa_train.task import DataParallelRank, Task
from moa_vision.data import DataConfig, ImageBatch, normalize
from moa_vision.probe.augment import Mixing, RandAugmented
from moa_vision.probe.encoders import Pool, TrainedEncoder
from moa_vision.probe.labelled import LabelledData, LabelledImages


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """MAE's linear probe (facebookresearch/mae, LINEAR_PROBE.md; arXiv:2111.06377, table 10).

    A normalization without parameters and a linear layer, on frozen features, by LARS; crops and flips only.

    Args:
        epochs: Passes over the training samples.
        warmup_epochs: Of them, those in which the rate rises.
        batch_size: Global batch.
        blr: Peak rate for a batch of 256; the rate is blr * batch_size / 256. The default belongs to MAE's batch and
            length. LARS moves the weights by rate / 1000 of their own norm, however large the gradients, so that the
            rate itself, 6.4 there, is what carries over: take a blr of about 1600 / batch_size (6.4 for 256), and
            more for fewer than some 2,000 steps. Too low a rate makes any encoder look bad.
        min_lr: Rate at the end.
        momentum: Of LARS.
        weight_decay: Of the linear layer's weights.
        crop_scale: Smallest and largest area of a crop, as a fraction of the image.
        hflip: Mirror half of the crops.
        pool: Features: the mean of the patch tokens (avg) or the class token (cls), after the last norm.
    """

    epochs: float = 90
    warmup_epochs: float = 10
    batch_size: int = 16384
    blr: float = 0.1
    min_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: bool = True
    pool: Pool = "avg"

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("linear.blr", self.blr, self.blr > 0, "above 0")
        require("linear.momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and less than 1")
        _check_length("linear", self)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """MAE's fine-tuning (facebookresearch/mae, FINETUNE.md; arXiv:2111.06377, table 9), with the values for ViT-B.

    Args:
        epochs: Passes over the training samples.
        warmup_epochs: Of them, those in which the rate rises.
        batch_size: Global batch.
        blr: Peak rate for a batch of 256; the rate is blr * batch_size / 256. (ViT-L: 1e-3.)
        min_lr: Rate at the end, of the last layer.
        betas: AdamW's decay rates of the two moments.
        weight_decay: For weights with two or more dimensions.
        layer_decay: Each layer learns at this multiple of the next one's rate. (ViT-L: 0.75.)
        drop_path: Largest rate of stochastic depth, which rises from block to block. (ViT-L: 0.2.)
        max_grad_norm: Largest global gradient norm; null leaves gradients as they are.
        smoothing: Part of a target that is spread evenly over all classes.
        mixup: Parameter of mixup's Beta distribution; 0: none.
        cutmix: Parameter of cutmix's Beta distribution; 0: none.
        rand_augment: timm's notation of a RandAugment policy; null: none.
        erase: Probability that a rectangle of an image is replaced by noise.
        crop_scale: Smallest and largest area of a crop, as a fraction of the image.
        hflip: Mirror half of the crops.
    """

    epochs: float = 100
    warmup_epochs: float = 5
    batch_size: int = 1024
    blr: float = 5e-4
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    drop_path: float = 0.1
    max_grad_norm: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: bool = True

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("finetune.blr", self.blr, self.blr > 0, "above 0")
        require("finetune.layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0 and at most 1")
        for name in ("drop_path", "smoothing"):
            value = getattr(self, name)
            require(f"finetune.{name}", value, 0 <= value < 1, "at least 0 and less than 1")
        for name in ("mixup", "cutmix"):
            require(f"finetune.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or above")
        require("finetune.erase", self.erase, 0 <= self.erase <= 1, "a probability")
        policy = self.rand_augment is None or self.rand_augment.startswith("rand-")
        require("finetune.rand_augment", self.rand_augment, policy, "such as rand-m9-mstd0.5-inc1, or null")
        _check_length("finetune", self)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


def _check_length(section: str, recipe: LinearConfig | FinetuneConfig) -> None:
    require(f"{section}.epochs", recipe.epochs, recipe.epochs > 0, "above 0")
    warmup = 0 <= recipe.warmup_epochs <= recipe.epochs
    allowed = f"from 0 to {section}.epochs ({recipe.epochs})"
    require(f"{section}.warmup_epochs", recipe.warmup_epochs, warmup, allowed)
    require(f"{section}.batch_size", recipe.batch_size, recipe.batch_size >= 1, "1 or above")
    rate = recipe.blr * recipe.batch_size / 256
    require(f"{section}.min_lr", recipe.min_lr, 0 <= recipe.min_lr <= rate, f"from 0 to the peak rate ({rate:.3g})")


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(RunConfig):
    """One training of a classifier; what its run folder's config.yaml holds.

    Args:
        method: Which of the two.
        recipe: Its section; `optim` and `schedule` follow from it.
        data: Shards and crops.
        schedule: Epochs, batch and last rate.
        encoder: `TrainedEncoder.identity`.
    """

    method: Literal["linear", "finetune"]
    recipe: LinearConfig | FinetuneConfig
    data: DataConfig
    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    encoder: dict[str, Any] = field(default_factory=dict)

    def gentler(self) -> tuple[str, ...]:
        """Return options with which a run may go on whose loss was not finite."""
        rate = f"--{self.method}.blr {self.recipe.blr / 2:.3g}"
        return (rate, "--finetune.max_grad_norm 1.0") if self.method == "finetune" else (rate,)


class Classifier(Task):
    """What both tasks have in common: all of a `moa_train.task.Task` but its model, its targets and its export.

    Args:
        config: The run.
        encoder: What is judged.

    Raises:
        ValueError, DataError: the data cannot be what the configuration says.
    """

    unit = "img"
    counter = "samples"
    units_per_sample = 1
    val_names: tuple[str, ...] = ("loss", "error", "error_top5")
    best_by = "error"
    model: nn.Module

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        self.config, self.encoder = config, encoder
        self.data = LabelledData(config.data, encoder.image_size, encoder.channels, config.folder / "bad_samples.jsonl")
        self.num_classes = self.data.num_classes
        self.samples_per_epoch = len(self.data.train)
        held_out, limit = len(self.data.val), config.loop.val_samples
        self.val_samples = held_out if limit is None else min(limit, held_out)
        self._held_out: Iterable[ImageBatch] | None = None
        batch = config.recipe.batch_size
        fits = batch <= self.samples_per_epoch
        require(f"{config.method}.batch_size", batch, fits, f"at most the {self.samples_per_epoch} training samples")

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the steps that the configured epochs come to."""
        return self.config.schedule.budget(steps_per_epoch)

    def startup_lines(self) -> dict[str, str]:
        """Return lines of the announcement."""
        data, trained = self.data, self.summary_fields()["parameters"]
        step = "" if self.encoder.step is None else f", step {self.encoder.step:,}"
        return {
            "encoder": f"{self.encoder.config['architecture']} of {self.encoder.folder}{step}",
            "parameters": ", ".join(f"{name} {count(number)}" for name, number in trained.items()),
            "data": (
                f"{len(data.train):,} images in {len(data.train.shards):,} shards, {self.num_classes:,} classes; "
                f"{self.val_samples:,} held out"
            ),
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts and the number of bad samples, for summary.json."""
        parameters = list(self.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters)
        return {
            "parameters": {"total": total, "trained": trained},
            "bad_samples": self.data.bad_samples.recorded(),
        }

    def no_weight_decay(self) -> set[str]:
        """Return nothing: the task's own optimizer sees to it."""
        return set()

    def example_batch(self, count: int) -> LabelledImages:
        """Return a made-up batch."""
        images = torch.zeros(count, self.encoder.channels, *self.encoder.image_size, dtype=torch.uint8)
        return LabelledImages(images, torch.zeros(count, dtype=torch.int64))

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[LabelledImages]:
        """Yield this process's micro-batches from `start_step` on."""
        return self.data.augmented(share, plan, start_step, self.config.seed)

    def val_batches(self, share: DataParallelRank) -> Iterable[LabelledImages]:
        """Yield this process's share of the held-out images."""
        if self._held_out is None:
            self._held_out = self.data.centred(self.data.val, share, self.val_samples)
        return self.data.read(self._held_out)

    def val_losses(self, model: nn.Module, batch: LabelledImages) -> dict[str, Tensor]:
        """Return each image's cross-entropy, and whether its class is not the first, not among the first five."""
        logits = model(self._normalized(batch.images)).float()
        top = logits.topk(min(5, self.num_classes), dim=1).indices == batch.labels[:, None]
        return {
            "loss": F.cross_entropy(logits, batch.labels, reduction="none"),
            "error": 1 - top[:, 0].float(),
            "error_top5": 1 - top.any(dim=1).float(),
        }

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Draw nothing."""

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.config.data.mean, self.config.data.std)


class LinearProbe(nn.Module):
    """A frozen encoder, a normalization without parameters, and a linear layer.

    Args:
        encoder: Images (B, C, H, W) to features (B, D); stays in evaluation mode and is never changed.
        features: D.
        num_classes: Outputs.
    """

    def __init__(self, encoder: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6)
        self.head = nn.Linear(features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode of all but the encoder."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        with torch.no_grad():
            features = self.encoder(images)
        return self.head(self.norm(features.float()))

    def folded_head(self) -> tuple[Tensor, Tensor]:
        """Return weight (num_classes, D) and bias of the linear layer that is normalization and head in one."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        weight = self.head.weight / (variance + self.norm.eps).sqrt()
        return weight, self.head.bias - weight @ mean


class LinearTask(Classifier):
    """The linear probe. A `moa_train.task.Task` with its own optimizer."""

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        super().__init__(config, encoder)
        assert isinstance(config.recipe, LinearConfig)
        self.recipe = config.recipe
        features = encoder.features(self.recipe.pool)
        self.probe = LinearProbe(features, features.num_features, self.num_classes)
        # In evaluation mode until training begins, so that measuring memory leaves the running statistics alone.
        self.model: nn.Module = self.probe.eval()
        # Nothing flows back through the encoder: all a step costs is the forward that the loop counts thrice.
        flops = forward_flops(self.model, self.example_batch(1).images)
        self.forward_flops_per_sample = round(flops / TRAINING_FLOPS_PER_FORWARD)

    def optimizer(self, config: OptimConfig) -> Lars:
        """Return LARS as MAE's code has it: the weights' steps are adapted to their norm, the bias's are not."""
        head = self.probe.head
        groups = [
            {"params": [head.weight], "weight_decay": config.weight_decay, "always_adapt": True},
            {"params": [head.bias], "weight_decay": 0.0, "always_adapt": False},
        ]
        return Lars([group | {"momentum": self.recipe.momentum} for group in groups], lr=config.lr)

    def loss(self, model: nn.Module, batch: LabelledImages) -> Tensor:
        """Return the mean cross-entropy of a micro-batch."""
        return F.cross_entropy(model(self._normalized(batch.images)).float(), batch.labels)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write encoder and probe as one timm classifier."""
        assert isinstance(model, LinearProbe)
        weight, bias = model.folded_head()
        state = {**model.encoder.state_dict(), "head.weight": weight, "head.bias": bias}
        pooling = {"global_pool": "token"} if self.recipe.pool == "cls" else {"global_pool": "avg", "fc_norm": False}
        self.encoder.export_classifier(state, self.num_classes, folder, **pooling)


class FinetuneTask(Classifier):
    """Fine-tuning of the whole encoder. A `moa_train.task.Task` with its own optimizer."""

    def __init__(self, config: ClassifierRun, encoder: TrainedEncoder) -> None:
        super().__init__(config, encoder)
        assert isinstance(config.recipe, FinetuneConfig)
        self.recipe = recipe = config.recipe
        self.vit = encoder.load(num_classes=self.num_classes, global_pool="avg", drop_path_rate=recipe.drop_path)
        assert isinstance(self.vit.head, nn.Linear)
        nn.init.trunc_normal_(self.vit.head.weight, std=2e-5)  # as in MAE
        nn.init.zeros_(self.vit.head.bias)
        self.model: nn.Module = self.vit.eval()
        self.forward_flops_per_sample = forward_flops(self.model, self.example_batch(1).images)
        self.augment = None
        if recipe.rand_augment:
            self.augment = RandAugmented(recipe.rand_augment, encoder.image_size, config.data.mean)
        self.mixing = Mixing(
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

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[LabelledImages]:
        """Yield this process's micro-batches from `start_step` on."""
        return self.data.augmented(share, plan, start_step, self.config.seed, self.augment)

    def loss(self, model: nn.Module, batch: LabelledImages) -> Tensor:
        """Return the mean cross-entropy of a micro-batch with its mixed, smoothed targets."""
        images, targets = self.mixing(self._normalized(batch.images), batch.labels, batch.seed)
        return self.soft_cross_entropy(model(images).float(), targets)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the classifier."""
        self.encoder.export_classifier(model.state_dict(), self.num_classes, folder, global_pool="avg")


def layer_groups(model: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return timm's parameter groups with layer-wise rates, each {"params", "weight_decay", "lr_scale"}.

    The embedding is layer 0, block i layer i + 1, all behind the blocks layer depth + 1, and layer l has the scale
    layer_decay ** (depth + 1 - l), as in MAE (util/lr_decay.py) and BEiT. Vectors, positions, class token and the
    mixing coefficients of LA variants are not decayed.
    """
    coefficients = {name for name, _ in model.named_parameters() if name.endswith("mix_coef")}
    spared = coefficients | set(model.no_weight_decay())
    return param_groups_layer_decay(model, weight_decay, spared, layer_decay=layer_decay)


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Return the floating-point operations of a forward pass of `images` (a multiply-add is two), counted on meta.

    Args:
        model: In evaluation mode; nothing is computed, and no weight is copied.
        images: (B, C, H, W) of any dtype; only their shape counts.
    """
    weights = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, (torch.empty(images.shape, device="meta"),))
    return counter.get_total_flops()
