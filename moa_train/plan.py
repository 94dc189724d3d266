"""Costs of a run on this machine: FLOPs and the time that they take."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    flops_per_sample: int
    peak_flops: float | None

    def utilization(self, throughput: float, world_size: int) -> float | None:
        """Return the fraction of the peak at `throughput` samples/s on all devices; None if the peak is unknown."""
        if self.peak_flops is None:
            return None
        return throughput * self.flops_per_sample / (self.peak_flops * world_size)


def describe(plan: Plan, costs: Costs, *, unit: str, units_per_sample: int, step: int) -> dict[str, str]:
    """Return the startup lines about the length and the costs of a run, {title: text}, after `step` steps."""
    samples = plan.total_steps * plan.global_batch
    flops = costs.flops_per_sample * (samples - step * plan.global_batch)
    what, of_units = (unit, f" of {units_per_sample:,} {unit}") if units_per_sample > 1 else ("sample", f" {unit}")
    time = ""
    if costs.peak_flops is not None:
        seconds = flops / (ASSUMED_UTILIZATION * costs.peak_flops * plan.world_size)
        time = f"; {duration(seconds)} at {ASSUMED_UTILIZATION:.0%} of the bf16 peak"
    decay = f", {plan.decay_steps:,} of decay ({plan.decay_type})" if plan.decay_steps else ""
    resumed = f"; resuming after step {step:,}" if step else ""
    return {
        "steps": f"{plan.total_steps:,} = {plan.epoch(plan.total_steps):.4g} epochs of {plan.steps_per_epoch:,}, "
        f"{plan.warmup_steps:,} of warm-up{decay}; {samples * units_per_sample:,} {unit}{resumed}",
        "batch": f"{plan.global_batch:,}{of_units} per step = {plan.accumulation} accumulated x {plan.world_size} "
        f"device(s) x {plan.micro_batch}",
        "work": f"{count(costs.flops_per_sample / units_per_sample)}FLOPs per {what} in training, {count(flops)}FLOPs "
        f"remaining{time}",
    }
