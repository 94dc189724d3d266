"""Interface between a task (a model with its data and losses) and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moa_train.config import OptimConfig
from moa_train.optim import build_optimizer
from moa_train.schedule import Budget, Plan

WEIGHT = "weight"
"""Key of `Task.val_losses` that holds the samples' weights instead of a loss."""


@dataclass(frozen=True)
class DataParallelRank:
    """A process's share of the data: number `rank` of `world_size`, with `micro_batch` samples at a time."""

    rank: int
    world_size: int
    micro_batch: int


class Task(ABC):
    """A model, its batches and its losses.

    A batch is any nesting of tensors; the trainer moves it to the device. Methods from `optimizer` on are optional.

    Attributes:
        model: The bare module, on the CPU, initialized from the seed.
        unit: Name of the counted unit in messages, e.g. "img" or "tok".
        counter: Column of the rows that counts units: "samples" or "tokens".
        units_per_sample: Units of a sample; 1 for images.
        samples_per_epoch: Number of training samples.
        val_samples: Held-out samples of a validation; 0 disables validation.
        forward_flops_per_sample: FLOPs of the forward pass of a sample.
        val_names: Keys of `val_losses`; "loss" is among them.
        best_by: The key of `val_names` that selects the best step.
        weighted: Whether the loss is a mean over items, such as labels, whose number varies between micro-batches.
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
    weighted: bool = False

    @abstractmethod
    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the number of optimizer steps of the run and of its warm-up."""

    @abstractmethod
    def startup_lines(self) -> dict[str, str]:
        """Return lines to print at the start, by title."""

    @abstractmethod
    def summary_fields(self) -> dict[str, Any]:
        """Return the task's fields of summary.json, e.g. "parameters"; called on the main process only."""

    @abstractmethod
    def example_batch(self, count: int) -> Any:
        """Return a made-up batch of `count` samples, for ranks without held-out samples left under FSDP2."""

    @abstractmethod
    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[Any]:
        """Yield this rank's micro-batches, in order, from step `start_step` to the end of the plan."""

    @abstractmethod
    def val_batches(self, share: DataParallelRank) -> Iterable[Any]:
        """Yield this rank's part of the held-out samples; each sample belongs to one rank."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a micro-batch, () float32, through `model` (the bare module or a wrapper)."""

    @abstractmethod
    def val_losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the losses (B,) of each sample for every name in `val_names`.

        The key `WEIGHT`, (B,), holds the samples' weights in the mean where they differ.
        """

    @abstractmethod
    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write figures or statistics of held-out samples into the run folder `folder`.

        Called on the main process only. `model` is whole, and may be another object than `self.model`, which FSDP2
        splits into shards.
        """

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the trained model for other libraries into the empty `folder`; `model` as in `write_diagnostics`."""

    def optimizer(self, config: OptimConfig) -> Optimizer:
        """Return the optimizer of `self.model`, which is on its device.

        All values in the optimizer's state must be tensors. A group with an "lr_scale" (timm's name) is stepped at
        that multiple of the scheduled learning rate.
        """
        return build_optimizer(self.model, config, self.no_weight_decay(), self.hidden_matrices())

    def no_weight_decay(self) -> Collection[str]:
        """Return names of parameters with two or more dimensions that get no weight decay."""
        return ()

    def hidden_matrices(self) -> Collection[str]:
        """Return names of the parameters, matrices and stacks of matrices, that Muon steps; empty without Muon."""
        return ()

    def observations(self) -> dict[str, Tensor]:
        """Return further values () for the training row of the last step, e.g. {"aux_loss": ...}.

        The row contains their means over all ranks. A "loss" replaces the training loss. Called on every rank, for
        written rows only.
        """
        return {}

    def items(self, batch: Any) -> Tensor:
        """Return the number of items of a micro-batch, () on its device; for `weighted` tasks only."""
        raise NotImplementedError

    def weighted_loss(self, model: nn.Module, batch: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss () to train on and, without gradient, `loss` (); for `weighted` tasks only.

        `weight`, () float32, is the number of items of the micro-batch divided by the mean number over all micro-
        batches of the step. The mean over items is multiplied by it; other parts of the loss are not.
        """
        raise NotImplementedError

    def sample_names(self, batch: Any) -> list[str]:
        """Return the names of a training batch's samples, for reports of non-finite losses."""
        return []

    def identity(self) -> dict[str, Any]:
        """Return checksums of the data, as JSON values; a run resumes only if they are unchanged."""
        return {}
