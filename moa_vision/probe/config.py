"""Configuration of the probes: MAE's recipes for linear probe and fine-tuning, and the keys of the command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moa_train.config import CheckpointConfig, LoopConfig
from moa_train.errors import require
from moa_vision.probe.knn import KNNConfig

Method = Literal["knn", "linear", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training length, batch size, learning rate and crops of a trained probe.

    Args:
        epochs: Passes over the training samples.
        warmup_epochs: Epochs of linear learning rate warm-up, part of `epochs`.
        batch_size: Global batch size.
        blr: Base learning rate; the peak learning rate is blr * batch_size / 256.
        min_lr: Learning rate at the end.
        weight_decay: Weight decay of parameters with two or more dimensions.
        crop_scale: Smallest and largest area of a crop, as a fraction of the image.
        hflip: Flip half of the crops horizontally.
    """

    section: ClassVar[str]
    epochs: float
    warmup_epochs: float
    batch_size: int
    blr: float
    min_lr: float
    weight_decay: float
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: bool = True

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.blr * self.batch_size / 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._require("epochs", self.epochs > 0, "above 0")
        warmup = 0 <= self.warmup_epochs <= self.epochs
        self._require("warmup_epochs", warmup, f"from 0 to {self.section}.epochs ({self.epochs})")
        self._require("batch_size", self.batch_size >= 1, "1 or above")
        self._require("blr", self.blr > 0, "above 0")
        self._require("min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to the peak learning rate ({self.lr:.3g})")

    def _require(self, key: str, allowed: bool, wanted: str) -> None:
        require(f"{self.section}.{key}", getattr(self, key), allowed, wanted)


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Recipe):
    """MAE's linear probe (facebookresearch/mae, LINEAR_PROBE.md; arXiv:2111.06377, table 10).

    A batch normalization without parameters and a linear layer on frozen features, trained with LARS on random crops.

    Args:
        blr: Base learning rate; the peak learning rate is blr * batch_size / 256. LARS scales updates to rate / 1000 of
            the weight norm, whatever the gradients, so the peak (6.4) carries over to other batch sizes: use a blr of
            about 1600 / batch_size, and more for fewer than about 2,000 steps.
        momentum: Momentum of LARS.
        pool: Features: mean of the patch tokens (avg) or class token (cls), after the final norm.
    """

    section: ClassVar[str] = "linear"
    epochs: float = 90
    warmup_epochs: float = 10
    batch_size: int = 16384
    blr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.9
    pool: Literal["avg", "cls"] = "avg"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe):
    """MAE's fine-tuning (facebookresearch/mae, FINETUNE.md; arXiv:2111.06377, table 9), with the values for ViT-B.

    Args:
        blr: Base learning rate; the peak learning rate is blr * batch_size / 256. (ViT-L: 1e-3.)
        min_lr: Learning rate of the last layer at the end.
        betas: AdamW's betas.
        layer_decay: Learning rate of each layer as a multiple of the next layer's. (ViT-L: 0.75.)
        drop_path: Stochastic depth rate of the last block; it rises linearly from 0. (ViT-L: 0.2.)
        max_grad_norm: Maximum global gradient norm; null disables clipping.
        smoothing: Label smoothing.
        mixup: Parameter of mixup's Beta distribution; 0 disables it.
        cutmix: Parameter of cutmix's Beta distribution; 0 disables it.
        rand_augment: RandAugment policy in timm's notation; null disables it.
        erase: Probability of random erasing.
    """

    section: ClassVar[str] = "finetune"
    epochs: float = 100
    warmup_epochs: float = 5
    batch_size: int = 1024
    blr: float = 5e-4
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.65
    drop_path: float = 0.1
    max_grad_norm: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges and the policy."""
        super().__post_init__()
        policy = self.rand_augment is None or self.rand_augment.startswith("rand-")
        self._require("rand_augment", policy, "a policy such as rand-m9-mstd0.5-inc1, or null")


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Loading of labelled images; null uses the value of the pre-training run, or else the default.

    Args:
        image_key: The image among a sample's members, e.g. input.jpg.
        val_crop_pct: Side of the central crop of held-out images, as a fraction of the image's.
        workers: Loader processes per device.
        cache_dir: Folder for indices and for remote shards; default ~/.cache/moa_vision.
        cache_gib: Maximum size of the remote shards kept there, in GiB.
        max_bad_samples: Maximum number of unusable samples; one more stops the probe.
    """

    image_key: str | None = None
    val_crop_pct: float | None = None
    workers: int | None = None
    cache_dir: str | None = None
    cache_gib: float | None = None
    max_bad_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Which encoders to evaluate, how, and on which data.

    Args:
        runs: Folders of finished runs, export folders, or sweep folders (all their finished runs).
        method: Any of knn, linear, finetune.
        train: Labelled training shards; null: the run's own.
        val: Labelled held-out shards; null: the run's own.
        name: Suffix that separates results on other data: knn writes probe/knn-NAME.json.
        seed: Seed of new weights, data order and augmentations.
        resume: auto resumes a trained probe; never refuses to resume; force resumes even if keys differ.
        data: Loading of labelled images.
        knn: Nearest neighbours.
        linear: The linear probe.
        finetune: Fine-tuning.
        loop: Training loop; knn uses micro_batch_size, precision and val_samples.
        checkpoint: Checkpoints of the trained probes.
    """

    runs: Sequence[str]
    method: Sequence[Method] = ("knn",)
    train: str | None = None
    val: str | None = None
    name: str = ""
    seed: int = 0
    resume: Literal["auto", "never", "force"] = "auto"
    data: ProbeData = field(default_factory=ProbeData)
    knn: KNNConfig = field(default_factory=KNNConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check the name and what depends on several keys."""
        require("name", self.name, bool(re.fullmatch(r"[\w.+-]*", self.name)), "letters, digits and . _ + -")
        together = (self.train is None) == (self.val is None)
        require("val", self.val, together, "given together with train, because both need the same classes")
        paired = "finetune" in self.method and (self.finetune.mixup > 0 or self.finetune.cutmix > 0)
        micro = self.loop.micro_batch_size
        require("loop.micro_batch_size", micro, not (paired and micro % 2), "even, because mixup and cutmix form pairs")


PLAIN_ARGUMENTS = {
    "runs": {
        "nargs": "+",
        "type": str,
        "metavar": "RUN",
        "help": "folder of a finished run, export folder, or folder of a sweep (all its finished runs)",
    },
    "--method": {
        "nargs": "+",
        "type": Method,
        "default": ["knn"],
        "help": "one or more: nearest neighbours, linear probe, fine-tuning",
    },
}
"""Fields of `ProbeConfig` that are ordinary arguments instead of keys; see `parse_config`."""
