"""What a run costs: FLOPs, bytes and seconds, before it does it."""

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
"""A backward pass costs twice the forward's matrix products."""

ASSUMED_UTILIZATION = 0.4
"""Part of the peak assumed for the time estimate before anything is measured."""


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
