"""Run configs: frozen dataclasses whose values are checked on construction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moa_train.config_parser import RENAMED_KEYS, as_tree, parse_config, read_config
from moa_train.errors import require
from moa_train.reading import differing_keys, flatten
from moa_train.schedule import Budget, DecayType

__all__ = [
    "RENAMED_KEYS",
    "RESUME_MUTABLE_KEYS",
    "START_FROM_MUTABLE_KEYS",
    "CheckpointConfig",
    "EpochSchedule",
    "LoopConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "as_tree",
    "differing_keys",
    "flatten",
    "parse_config",
    "read_config",
]


def _require_at_least(minimum: int, section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or value >= minimum, f"{minimum} or above")


def _require_above(minimum: int, section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or value > minimum, f"above {minimum}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings.

    Args:
        algorithm: adamw, or muon: Muon for hidden matrices and AdamW for all other parameters.
        lr: Peak learning rate, absolute (no scaling by the batch).
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay, for weights with two or more dimensions.
        fused: Use the fused AdamW kernel where the device has one.
        momentum: Muon's Nesterov momentum.
        muon_scale: Scale of Muon's orthogonalized update of a matrix (A, B). match_rms_adamw: 0.2 sqrt(max(A, B)), the
            size of AdamW's usual update, so that a learning rate tuned for AdamW fits (arXiv:2502.16982). original:
            sqrt(max(1, A / B)).
        adamw_lr_scale: With muon, the learning rate of AdamW's parameters as a multiple of lr.
        max_grad_norm: Largest global gradient norm; null disables clipping.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    fused: bool = True
    momentum: float = 0.95
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw_lr_scale: float = 1.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        _require_above(0, "optim", self, "lr", "eps", "adamw_lr_scale", "max_grad_norm")
        _require_at_least(0, "optim", self, "weight_decay")
        require("optim.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        require("optim.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Batch size and learning rate schedule; subclasses add the length.

    Args:
        min_lr: Learning rate at the end.
        batch_size: Global batch of one optimizer step, in samples, the same on any number of devices.
        decay_fraction: Fraction of all steps over which the learning rate decays, at the end of the run; before the
            decay it stays at the peak (warmup-stable-decay). 1 decays from the end of the warm-up.
        decay_type: Shape of the decay: half a cosine, linear, or 1 - sqrt of the progress.
    """

    min_lr: float = 0.0
    batch_size: int = 64
    decay_fraction: float = 1.0
    decay_type: DecayType = "cosine"

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        _require_at_least(0, "schedule", self, "min_lr")
        _require_at_least(1, "schedule", self, "batch_size")
        require("schedule.decay_fraction", self.decay_fraction, 0 <= self.decay_fraction <= 1, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EpochSchedule(ScheduleConfig):
    """Length, batch size and learning rate schedule.

    Args:
        epochs: Passes over the training set.
        warmup_epochs: Epochs of linear warm-up from 0, updated every step.
    """

    epochs: float = 1.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        super().__post_init__()
        _require_above(0, "schedule", self, "epochs")
        warmup = 0 <= self.warmup_epochs <= self.epochs
        require("schedule.warmup_epochs", self.warmup_epochs, warmup, f"from 0 to schedule.epochs ({self.epochs})")

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the number of steps of the run and of its warm-up."""
        return Budget(max(1, round(self.epochs * steps_per_epoch)), round(self.warmup_epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Training loop settings; intervals are in optimizer steps, and the last step is always due.

    Args:
        micro_batch_size: Samples of one forward and backward pass on one device; the rest is accumulated.
        precision: float32, or bf16 autocast over float32 weights.
        compile: Compile the model with torch.compile.
        log_every: Steps between training rows in metrics.jsonl.
        val_every: Steps between validations on the held-out samples.
        val_samples: Held-out samples of each validation; null uses all of them.
        num_diagnostic_samples: Held-out samples (without any, a language model's training sequences) for diagnostics
            (reconstructions, mixing, expert load) every `val_every` steps; 0 disables them.
        max_nonfinite_steps: Number of steps with a non-finite loss or gradient that a run may skip; one more ends the
            run.
        world_size: Required number of processes on all machines together; null accepts any.
        trackers: Names of accelerate's trackers, e.g. tensorboard, wandb; [] disables them. A resumed run continues
            the same W&B run. Their files are in the run folder, in trackers.
    """

    micro_batch_size: int = 64
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    log_every: int = 10
    val_every: int = 500
    val_samples: int | None = None
    num_diagnostic_samples: int = 8
    max_nonfinite_steps: int = 0
    world_size: int | None = None
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        _require_at_least(1, "loop", self, "micro_batch_size", "log_every", "val_every", "val_samples", "world_size")
        _require_at_least(0, "loop", self, "num_diagnostic_samples", "max_nonfinite_steps")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoint settings; intervals are in optimizer steps, and the last step is always due.

    Args:
        interval: Steps between checkpoints. They are written while training continues.
        keep_latest: Number of newest checkpoints to keep.
        keep_interval: Steps between checkpoints that are kept permanently, a multiple of interval; null keeps none.
    """

    interval: int = 500
    keep_latest: int = 2
    keep_interval: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        _require_at_least(1, "checkpoint", self, "interval", "keep_latest", "keep_interval")
        multiple = self.keep_interval is None or self.keep_interval % self.interval == 0
        wanted = f"a multiple of checkpoint.interval ({self.interval}), or null"
        require("checkpoint.keep_interval", self.keep_interval, multiple, wanted)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every run; vision and language runs add their model and data.

    Args:
        name: Name of the run; its folder is out/name.
        seed: Seed of the weights, the order of the data and every augmentation.
        out: Folder of all runs.
        resume: auto continues an existing run; never refuses to; force continues even if other keys have changed.
        start_from: Checkpoint of another run (RUN/checkpoints/step_XXXXXXXX) to start from instead of new weights:
            weights, optimizer, position in the data and step. A warmup-stable-decay run can be decayed from any of its
            stable checkpoints in this way.
        optim: Optimizer settings.
        schedule: Length, batch size and learning rate schedule.
        loop: Training loop settings.
        checkpoint: Checkpoint settings.
        evaluators: Measurements during training by name, each with its interval in steps and its own settings, such as
            {knn: {interval: 500, train: SHARDS, val: SHARDS}}; see docs/pretraining.md.
    """

    name: str = "run"
    seed: int = 0
    out: str = "runs"
    resume: Literal["auto", "never", "force"] = "auto"
    start_from: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields; raise ConfigError naming the key."""
        plain = bool(re.fullmatch(r"[\w.+-]+", self.name)) and self.name not in (".", "..")
        require("name", self.name, plain, "a folder name of letters, digits and . _ + -")
        require("seed", self.seed, 0 <= self.seed < 2**31, "from 0 to 2147483647")
        low = self.schedule.min_lr <= self.optim.lr
        require("schedule.min_lr", self.schedule.min_lr, low, f"at most optim.lr ({self.optim.lr})")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) / self.name


RESUME_MUTABLE_KEYS = frozenset(
    {"out", "resume", "evaluators"}
    | {f"loop.{key}" for key in ("micro_batch_size", "compile", "log_every", "val_every", "num_diagnostic_samples")}
    | {f"loop.{key}" for key in ("max_nonfinite_steps", "world_size", "trackers")}
    | {f"checkpoint.{key}" for key in ("interval", "keep_latest", "keep_interval")}
)
"""Keys that may change when a run is resumed: they do not change what is trained."""

START_FROM_MUTABLE_KEYS = frozenset(
    {"name", "start_from"}
    | {f"schedule.{key}" for key in ("epochs", "warmup_epochs", "tokens", "tokens_per_parameter", "warmup_steps")}
    | {f"schedule.{key}" for key in ("min_lr", "decay_fraction", "decay_type")}
)
"""Further keys that may differ between a run and the one whose checkpoint it starts from."""
