"""What a half (vision, language) gives the loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from moa_train.config import OptimConfig
from moa_train.schedule import Budget, Plan

WEIGHT = "weight"
"""Key of `Task.val_losses` that is no loss."""


@dataclass(frozen=True)
class DataParallelRank:
    """One process's part of the work: it is number `rank` of `world_size`, and each takes `micro_batch` at a time."""

    rank: int
    world_size: int
    micro_batch: int


class Task(Protocol):
    """A model, its batches and its losses. Batches are what `loss` takes: tensors in any nesting, moved to the device
    by the loop.

    Attributes:
        model: The bare module, on the CPU, initialized from the seed.
        unit: Name in messages of what is counted, e.g. "img" or "tok".
        counter: Column of the records that counts it: "samples", or "tokens" of which a sample has many.
        units_per_sample: How many of it a sample has; 1 for images.
        samples_per_epoch: Training samples.
        val_samples: Held-out samples of one validation; 0: there is none.
        forward_flops_per_sample: FLOPs of one sample's forward pass.
        val_names: What `val_losses` returns, "loss" among them.
        best_by: The one of them by which the best step is chosen.
    """

    model: nn.Module
    unit: str
    counter: str
    units_per_sample: int
    samples_per_epoch: int
    val_samples: int
    forward_flops_per_sample: int
    val_names: tuple[str, ...]
    best_by: str

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return how many optimizer steps the run takes, and its warm-up."""
        ...

    def startup_lines(self) -> dict[str, str]:
        """Return lines of the announcement, title to text."""
        ...

    def summary_fields(self) -> dict[str, Any]:
        """Return what summary.json says of the task, e.g. "parameters" by part; asked on the main process only."""
        ...

    def no_weight_decay(self) -> Collection[str]:
        """Return names of parameters without weight decay, beyond those with fewer than two dimensions."""
        ...

    def example_batch(self, count: int) -> Any:
        """Return a made-up batch of `count` samples, to measure what `loss` needs."""
        ...

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[Any]:
        """Yield this process's micro-batches, in order, for the steps from `start_step` to the plan's end."""
        ...

    def val_batches(self, share: DataParallelRank) -> Iterable[Any]:
        """Yield this process's share of the held-out samples; over all processes each sample comes once."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return a micro-batch's mean loss, () float32, through `model` (the bare module or a wrapper of it)."""
        ...

    def val_losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return each sample's losses, (B,) each, for every name of `val_names`.

        Where samples do not count alike in the mean, what each counts stands under `WEIGHT`, (B,).
        """
        ...

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Draw what the model does on held-out samples, or what it has in their place, into the run folder `folder`.

        Asked on the main process only, with `model` whole: it need not be the task's own, which may be in shards.
        """
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the trained model, in the form that others load, into the empty `folder`; as `write_diagnostics`."""
        ...


@runtime_checkable
class OwnOptimizer(Protocol):
    """A task that brings its own optimizer in place of `moa_train.optim.build_optimizer`'s AdamW.

    A parameter group with an "lr_scale" (timm's name) is stepped at that multiple of the scheduled rate.
    """

    def optimizer(self, config: OptimConfig) -> Optimizer:
        """Return the optimizer of the task's model, which is on its device by then.

        Every value of its state must be a tensor, so that a checkpoint can hold it.
        """
        ...


@runtime_checkable
class Observed(Protocol):
    """A task that has more to say of its training steps than their loss."""

    def observations(self) -> dict[str, Tensor]:
        """Return values () for the training row of the step just finished, e.g. {"aux_loss": ...}, of which the mean
        over all processes is written; a "loss" takes the place of what is trained on. Asked on every process, and
        only for rows that are written.
        """
        ...


@runtime_checkable
class Weighted(Protocol):
    """A task whose loss is a mean over items, such as labels, of which a micro-batch may have more than another.

    A step's loss is then the mean over all items of the global batch, however that is split into micro-batches.

    Attributes:
        weighted: Whether they differ; if not, all is as for any other task.
    """

    weighted: bool

    def items(self, batch: Any) -> Tensor:
        """Return how many items a micro-batch has, () on its device."""
        ...

    def weighted_loss(self, model: nn.Module, batch: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to train on, (), and without gradient `Task.loss`, ().

        They differ in that the mean over items counts `weight` times, () float32: the micro-batch's items by the mean
        of all micro-batches'. What is no mean over items counts once.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """A task that can tell which samples a batch consists of."""

    def sample_names(self, batch: Any) -> list[str]:
        """Return the names of a training batch's samples, by which a person finds them."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A task that stands on something which its configuration names but does not hold, such as files of tokens."""

    def identity(self) -> dict[str, Any]:
        """Return what tells it from others, in JSON types, e.g. checksums. A run goes on with the same only."""
        ...


@runtime_checkable
class HiddenMatrices(Protocol):
    """A task whose model can be trained with Muon."""

    def hidden_matrices(self) -> Collection[str]:
        """Return the names of the parameters, matrices and stacks of matrices, that Muon is to step."""
        ...
