"""Length of a run, its FLOPs, and the time that they take, as startup lines."""

from __future__ import annotations

from moa_train.progress import count, duration
from moa_train.schedule import Plan

TRAINING_FLOPS_PER_FORWARD = 3
"""FLOPs of forward and backward pass over those of the forward pass."""

ASSUMED_UTILIZATION = 0.4
"""Fraction of the peak assumed where nothing has been measured."""


def describe(
    plan: Plan, flops_per_sample: int, peak_flops: float | None, *, unit: str, units_per_sample: int, step: int
) -> dict[str, str]:
    """Return the startup lines about the length and the costs of a run, {title: text}, after `step` steps.

    `flops_per_sample` are those of forward and backward; `peak_flops` is the bf16 peak of a device, None if unknown.
    """
    samples = plan.total_steps * plan.global_batch
    flops = flops_per_sample * (samples - step * plan.global_batch)
    what, of_units = (unit, f" of {units_per_sample:,} {unit}") if units_per_sample > 1 else ("sample", f" {unit}")
    time = ""
    if peak_flops is not None:
        seconds = flops / (ASSUMED_UTILIZATION * peak_flops * plan.world_size)
        time = f"; {duration(seconds)} at {ASSUMED_UTILIZATION:.0%} of the bf16 peak"
    partly = plan.decay_steps < plan.total_steps - plan.warmup_steps
    decay = f", {plan.decay_steps:,} of decay ({plan.decay_type}) at the end" if partly else ""
    resumed = f"; resuming after step {step:,}" if step else ""
    return {
        "steps": f"{plan.total_steps:,} = {plan.epoch(plan.total_steps):.4g} epochs of {plan.steps_per_epoch:,}, "
        f"{plan.warmup_steps:,} of warm-up{decay}; {samples * units_per_sample:,} {unit}{resumed}",
        "batch": f"{plan.global_batch:,}{of_units} per step = {plan.accumulation} accumulated x {plan.world_size} "
        f"device(s) x {plan.micro_batch}",
        "work": f"{count(flops_per_sample / units_per_sample)}FLOPs per {what} in training, {count(flops)}FLOPs "
        f"remaining{time}",
    }
