"""What a run is going to do, in steps, batches, FLOPs, bytes and seconds, before it does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moa_train.config import RunConfig, require
from moa_train.devices import bf16_peak_flops, device_name, saved_bytes_per_sample, state_bytes
from moa_train.progress import count, duration
from moa_train.schedule import Budget, DecayType, lr_at

TRAINING_FLOPS_PER_FORWARD = 3
"""A backward pass costs twice the forward's matrix products."""

ASSUMED_UTILIZATION = 0.4
"""Part of the peak assumed for the time estimate before anything is measured."""

LARGEST_BATCH = 10**9
"""Samples of a global batch, far beyond any; what shares it is found in moments."""


@dataclass(frozen=True)
class Plan:
    """A run's schedule, counted in optimizer steps.

    Attributes:
        steps_per_epoch: Whole global batches in the training set; what is left over is dropped.
        total_steps, warmup_steps, decay_steps: Length of the run, of its warm-up, and of the fall of its rate.
        global_batch: Samples of one optimizer step = accumulation * world_size * micro_batch.
        accumulation: Micro-batches that one device accumulates in a step.
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
        """Return the rate of the step that follows `step` finished ones; see `moa_train.schedule.lr_at`."""
        return lr_at(
            step,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            decay_steps=self.decay_steps,
            shape=self.decay_type,
        )

    def is_decaying(self, step: int) -> bool:
        """Tell whether the rate has begun to fall before `step` steps are finished."""
        return step > self.total_steps - self.decay_steps

    def is_stable(self, step: int) -> bool:
        """Tell whether, after `step` steps, the warm-up is over and the rate has not begun to fall."""
        return self.warmup_steps <= step and not self.is_decaying(step)

    def epoch(self, step: int) -> float:
        """Return the epochs that `step` finished steps come to."""
        return step / self.steps_per_epoch

    def due(self, step: int, every: int) -> bool:
        """Tell whether something done every so many steps, and after the last one, is due after `step` steps."""
        return step > 0 and (step % every == 0 or step == self.total_steps)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending; found up to its root, so that no batch takes long."""
    below = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*below, *(number // n for n in below)})


def make_plan(config: RunConfig, samples_per_epoch: int, budget: Callable[[int], Budget], world_size: int) -> Plan:
    """Count a run in steps and split the global batch; `budget` turns the steps of an epoch into those of the run.

    Raises:
        ValueError: the training set is smaller than a batch, that above `LARGEST_BATCH`, or no multiple of
            world_size * loop.micro_batch_size; the message gives the nearest of each that work.
    """
    batch, micro = config.schedule.batch_size, config.loop.micro_batch_size
    require("schedule.batch_size", batch, batch <= LARGEST_BATCH, f"at most {LARGEST_BATCH:,}")
    at_once = world_size * micro
    if batch % at_once:
        below, above = batch // at_once * at_once, (batch // at_once + 1) * at_once
        shares = divisors(batch // world_size) if batch >= world_size and batch % world_size == 0 else []
        fitting = max((m for m in shares if m < micro), default=None)
        shared = divisors(batch // micro) if batch >= micro and batch % micro == 0 else []  # numbers of processes
        nearest = [*[n for n in shared if n < world_size][-1:], *[n for n in shared if n > world_size][:1]]
        raise ValueError(
            f"schedule.batch_size is {batch}; it must be a multiple of {at_once} ({world_size} processes x "
            f"loop.micro_batch_size {micro}): the nearest are {f'{below} and ' if below else ''}{above}"
            + (f", or keep it with loop.micro_batch_size {fitting}" if fitting else "")
            + (f", or with {' or '.join(map(str, nearest))} processes" if nearest else "")
        )
    steps_per_epoch = samples_per_epoch // batch
    if not steps_per_epoch:
        raise ValueError(
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


@dataclass(frozen=True)
class Costs:
    """What one run costs.

    Attributes:
        flops_per_sample: Training FLOPs of a sample, forward and backward.
        peak_flops: The device's bf16 peak in FLOP/s, None where it is not known.
        state_bytes: Weights, gradients and moments on one device.
        saved_bytes_per_sample: What backward needs of one sample, in eager mode.
    """

    flops_per_sample: int
    peak_flops: float | None
    state_bytes: int
    saved_bytes_per_sample: int

    def utilization(self, throughput: float, world_size: int) -> float | None:
        """Return the part of the devices' peak that `throughput` samples/s come to, None where it is not known."""
        if self.peak_flops is None:
            return None
        return throughput * self.flops_per_sample / (self.peak_flops * world_size)


def measure_costs(
    model: nn.Module,
    loss: Callable[[Any], torch.Tensor],
    example_batch: Callable[[int], Any],
    forward_flops_per_sample: int,
    hidden_matrices: Collection[str] = (),
) -> Costs:
    """Return what training `model`, on its device, costs; runs `loss(example_batch(n))` for n = 1 and 2.

    `hidden_matrices` are the parameters that Muon steps.
    """
    device = next(model.parameters()).device
    return Costs(
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops_per_sample,
        peak_flops=bf16_peak_flops(device_name(device)),
        state_bytes=state_bytes(model, hidden_matrices),
        saved_bytes_per_sample=saved_bytes_per_sample(model, loss, example_batch),
    )


def describe(plan: Plan, costs: Costs, *, unit: str, units_per_sample: int, step: int) -> dict[str, str]:
    """Return the lines of the announcement that follow from the plan: {"steps", "work", "memory", "time"}."""
    samples, activations = plan.total_steps * plan.global_batch, plan.micro_batch * costs.saved_bytes_per_sample
    flops = costs.flops_per_sample * (samples - step * plan.global_batch)
    what, of_units = (unit, f" of {units_per_sample:,} {unit}") if units_per_sample > 1 else ("sample", f" {unit}")
    flops_per_unit = costs.flops_per_sample / units_per_sample
    if costs.peak_flops is None:
        time = "no peak rate is known for this device; told once measured"
    else:
        seconds = flops / (ASSUMED_UTILIZATION * costs.peak_flops * plan.world_size)
        time = f"{duration(seconds)} at {ASSUMED_UTILIZATION:.0%} of the bf16 peak; told again once measured"
    partly = plan.decay_steps < plan.total_steps - plan.warmup_steps
    decay = f", {plan.decay_steps:,} of decay ({plan.decay_type}) at the end" if partly else ""
    return {
        "steps": (
            f"{plan.total_steps:,} = {plan.epoch(plan.total_steps):.4g} epochs of {plan.steps_per_epoch:,}, "
            f"{plan.warmup_steps:,} of warm-up{decay}; {samples * units_per_sample:,} {unit} in all"
            + (f"; continuing after step {step:,}" if step else "")
        ),
        "batch": (
            f"{plan.global_batch:,}{of_units} a step = {plan.accumulation} accumulated x {plan.world_size} device(s) "
            f"x {plan.micro_batch}"
        ),
        "work": f"{count(flops_per_unit)}FLOPs a {what} in training, {count(flops)}FLOPs to do",
        "memory": (
            f"about {(costs.state_bytes + activations) / 2**20:,.0f} MiB a device: weights, gradients and moments "
            f"{costs.state_bytes / 2**20:,.0f}, activations of {plan.micro_batch}{of_units} "
            f"{activations / 2**20:,.0f}"
        ),
        "time": time,
    }
