"""Costs of a run on this machine, before it starts: FLOPs, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moa_train.devices import bf16_peak_flops, device_name, saved_bytes_per_sample, state_bytes
from moa_train.progress import count, duration
from moa_train.schedule import Plan

TRAINING_FLOPS_PER_FORWARD = 3
"""FLOPs of forward and backward pass over those of the forward pass."""

ASSUMED_UTILIZATION = 0.4
"""Fraction of the peak assumed where nothing has been measured."""


@dataclass(frozen=True)
class Costs:
    """Costs of a run on this machine.

    Attributes:
        flops_per_sample: Training FLOPs of a sample, forward and backward.
        peak_flops: bf16 peak of the device in FLOP/s, None if unknown.
        state_bytes: Weights, gradients and optimizer moments on one device.
        saved_bytes_per_sample: Activations saved for backward per sample, in eager mode.
    """

    flops_per_sample: int
    peak_flops: float | None
    state_bytes: int
    saved_bytes_per_sample: int

    def utilization(self, throughput: float, world_size: int) -> float | None:
        """Return the fraction of the peak at `throughput` samples/s on all devices; None if the peak is unknown."""
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
    """Return the costs of training a model on its device.

    Args:
        model: The model.
        loss: Returns the loss of a batch; called with `example_batch(n)` for n = 1 and 2.
        example_batch: Returns a batch of n samples.
        forward_flops_per_sample: FLOPs of the forward pass of a sample.
        hidden_matrices: Names of the parameters that Muon updates.
    """
    device = next(model.parameters()).device
    return Costs(
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops_per_sample,
        peak_flops=bf16_peak_flops(device_name(device)),
        state_bytes=state_bytes(model, hidden_matrices),
        saved_bytes_per_sample=saved_bytes_per_sample(model, loss, example_batch),
    )


def describe(plan: Plan, costs: Costs, *, unit: str, units_per_sample: int, step: int) -> dict[str, str]:
    """Return the startup lines about the length and the costs of a run, {title: text}.

    Args:
        plan: The schedule.
        costs: Costs of the run.
        unit: Unit of the data, e.g. "tok".
        units_per_sample: Units of a sample.
        step: Finished optimizer steps.
    """
    samples, activations = plan.total_steps * plan.global_batch, plan.micro_batch * costs.saved_bytes_per_sample
    flops = costs.flops_per_sample * (samples - step * plan.global_batch)
    what, of_units = (unit, f" of {units_per_sample:,} {unit}") if units_per_sample > 1 else ("sample", f" {unit}")
    time = "unknown until measured, since the bf16 peak of this device is unknown"
    if costs.peak_flops is not None:
        seconds = flops / (ASSUMED_UTILIZATION * costs.peak_flops * plan.world_size)
        time = f"{duration(seconds)} at {ASSUMED_UTILIZATION:.0%} of the bf16 peak, until measured"
    partly = plan.decay_steps < plan.total_steps - plan.warmup_steps
    decay = f", {plan.decay_steps:,} of decay ({plan.decay_type}) at the end" if partly else ""
    resumed = f"; resuming after step {step:,}" if step else ""
    return {
        "steps": f"{plan.total_steps:,} = {plan.epoch(plan.total_steps):.4g} epochs of {plan.steps_per_epoch:,}, "
        f"{plan.warmup_steps:,} of warm-up{decay}; {samples * units_per_sample:,} {unit}{resumed}",
        "batch": f"{plan.global_batch:,}{of_units} per step = {plan.accumulation} accumulated x {plan.world_size} "
        f"device(s) x {plan.micro_batch}",
        "work": f"{count(costs.flops_per_sample / units_per_sample)}FLOPs per {what} in training, {count(flops)}FLOPs "
        "remaining",
        "memory": f"about {(costs.state_bytes + activations) / 2**20:,.0f} MiB per device: weights, gradients and "
        f"moments {costs.state_bytes / 2**20:,.0f}, activations of {plan.micro_batch}{of_units} "
        f"{activations / 2**20:,.0f}",
        "time": time,
    }
