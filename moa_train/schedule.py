"""Length of a run, split of its global batch, and learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from moa_train.errors import ConfigError

if TYPE_CHECKING:
    from moa_train.config import RunConfig

DecayType = Literal["cosine", "linear", "1-sqrt"]


class Budget(NamedTuple):
    """Optimizer steps of a run and of its warm-up."""

    total_steps: int
    warmup_steps: int


def lr_at(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int | None = None,
    decay_type: DecayType = "cosine",
) -> float:
    """Return the learning rate of the optimizer step that follows `step` finished steps.

    It rises linearly from 0 over the first `warmup_steps`, stays at `lr`, and falls to `min_lr` over the last
    `decay_steps`. A cosine over all steps after the warm-up, the default, is the MAE recipe (facebookresearch/mae,
    util/lr_sched.py), updated every step. With fewer decay steps it is warmup-stable-decay (arXiv:2404.06395). At a
    progress p of the decay, (lr - min_lr) is scaled by (1 + cos(pi p)) / 2, 1 - p, or 1 - sqrt(p) (arXiv:2405.18392).
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    if decay_steps is None:
        decay_steps = total_steps - warmup_steps
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / max(1, decay_steps)))
    left = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[decay_type]
    return min_lr + (lr - min_lr) * left


@dataclass(frozen=True)
class Plan:
    """A run's schedule, counted in optimizer steps.

    Attributes:
        steps_per_epoch: Whole global batches in the training set; the remainder is dropped.
        total_steps, warmup_steps, decay_steps: Length of the run, its warm-up and its decay.
        global_batch: Samples of one optimizer step = accumulation * world_size * micro_batch.
        accumulation: Micro-batches that one rank accumulates in a step.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    decay_steps: int
    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int
    lr: float
    min_lr: float
    decay_type: DecayType

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the step that follows `step` finished steps; see `moa_train.schedule.lr_at`."""
        return lr_at(
            step,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            decay_steps=self.decay_steps,
            decay_type=self.decay_type,
        )

    def is_decaying(self, step: int) -> bool:
        """Return whether the learning rate has begun to decay within `step` steps."""
        return step > self.total_steps - self.decay_steps

    def is_stable(self, step: int) -> bool:
        """Return whether, after `step` steps, the warm-up is over and the decay has not begun."""
        return self.warmup_steps <= step and not self.is_decaying(step)

    def epoch(self, step: int) -> float:
        """Return the number of epochs in `step` steps."""
        return step / self.steps_per_epoch

    def due(self, step: int, every: int) -> bool:
        """Return whether an action with the interval `every`, and after the last step, is due after `step` steps."""
        return step > 0 and (step % every == 0 or step == self.total_steps)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    below = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*below, *(number // n for n in below)})


def make_plan(config: RunConfig, samples_per_epoch: int, budget: Callable[[int], Budget], world_size: int) -> Plan:
    """Count a run in steps and split its global batch; `budget` turns the steps of an epoch into those of the run.

    Raises:
        ConfigError: The global batch is larger than the training set, or no multiple of world_size *
            loop.micro_batch_size; the message gives the nearest values that work.
    """
    batch, micro = config.schedule.batch_size, config.loop.micro_batch_size
    at_once = world_size * micro
    if batch % at_once:
        below, above = batch // at_once * at_once, (batch // at_once + 1) * at_once
        per_rank = divisors(batch // world_size) if batch % world_size == 0 else []
        fitting = max((divisor for divisor in per_rank if divisor < micro), default=None)
        raise ConfigError(
            f"schedule.batch_size is {batch}; it must be a multiple of {at_once} (world size {world_size} x "
            f"loop.micro_batch_size {micro}): the nearest are {f'{below} and ' if below else ''}{above}"
            + (f"; or set loop.micro_batch_size to {fitting}" if fitting else "")
        )
    steps_per_epoch = samples_per_epoch // batch
    if not steps_per_epoch:
        raise ConfigError(
            f"schedule.batch_size is {batch}; it must be at most the training set's {samples_per_epoch} samples"
        )
    total_steps, warmup_steps = budget(steps_per_epoch)
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        decay_steps=min(max(0, total_steps - warmup_steps), round(config.schedule.decay_fraction * total_steps)),
        global_batch=batch,
        micro_batch=micro,
        accumulation=batch // at_once,
        world_size=world_size,
        lr=config.optim.lr,
        min_lr=config.schedule.min_lr,
        decay_type=config.schedule.decay_type,
    )
