"""Estimate of a run on target hardware: memory, hours, loader cores and checkpoint size; see docs/planning.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from moa_train.config import RunConfig
from moa_train.devices import Gpu, SavedBytes, bf16_peak_flops
from moa_train.distributed import blocks
from moa_train.errors import ConfigError, require
from moa_train.muon import orthogonalize_flops
from moa_train.plan import ASSUMED_UTILIZATION
from moa_train.progress import count
from moa_train.reading import read_json
from moa_train.run_folder import RunFolder
from moa_train.schedule import Budget, Plan, divisors, make_plan

USABLE_MEMORY = 0.9
"""Fraction of the device memory available to a plan; drivers, the allocator and temporaries take the rest."""

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of a model and its optimizer, unsharded.

    Attributes:
        weights, gradients: Of all parameters, and of the trained ones.
        moments: Two per parameter with AdamW, one with Muon.
        block: Weights of the largest block, the unit that FSDP2 gathers.
        root: Weights outside of blocks, which FSDP2 gathers together.
    """

    weights: int
    gradients: int
    moments: int
    block: int
    root: int


def count_states(model: nn.Module, hidden_matrices: Collection[str] = ()) -> ModelStates:
    """Count the states of a model on any device, "meta" too; `hidden_matrices` are the names of Muon's parameters."""

    def size(parameters: Collection[nn.Parameter]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    weights = size([*model.parameters()])
    gradients = size([p for p in model.parameters() if p.requires_grad])
    by_muon = size([p for name, p in model.named_parameters() if name in hidden_matrices])
    parts = [[*block.parameters()] for block in blocks(model)]
    return ModelStates(
        weights=weights,
        gradients=gradients,
        moments=2 * gradients - by_muon,
        block=max(map(size, parts), default=0),
        root=weights - size({parameter for part in parts for parameter in part}),
    )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requirements of a run, independent of the hardware.

    Attributes:
        title, parameters: Description of the model, and parameter counts by part.
        unit, units_per_sample, samples_per_epoch, budget: As in `moa_train.task.Task`.
        flops_per_sample: Training FLOPs of a sample, forward and backward.
        loader_core_s: Returns the core-seconds to prepare a sample, given the micro-batch.
        muon: Shapes of the matrices (A, B) and stacks (E, A, B) that Muon updates.
        assumed: Assumptions, for the user.
    """

    title: str
    parameters: dict[str, int]
    unit: str
    units_per_sample: int
    samples_per_epoch: int
    budget: Callable[[int], Budget]
    flops_per_sample: int
    states: ModelStates
    saved: SavedBytes
    loader_core_s: Callable[[int], float] = lambda micro_batch: 0.0
    muon: tuple[tuple[int, ...], ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Target hardware.

    Attributes:
        flops, source: Sustained FLOP/s of a device, and the origin of that rate for the user.
        parallel: "ddp" replicates the model; "fsdp2" shards it and gathers it block by block.
    """

    gpu: Gpu
    flops: float
    source: str
    parallel: Literal["ddp", "fsdp2"] = "ddp"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate for one number of devices.

    Attributes:
        gpus: Requested devices; `plan.world_size` are used.
        memory, fits: Bytes on a device, and whether it has them.
        cores: CPU cores on all nodes that keep the loader as fast as the devices.
    """

    gpus: int
    plan: Plan
    memory: int
    fits: bool
    step_s: float
    cores: float
    checkpoint_bytes: int

    @property
    def hours(self) -> float:
        """Hours of training, without validation and checkpointing."""
        return self.plan.total_steps * self.step_s / 3600

    @property
    def samples_per_s(self) -> float:
        """Throughput of all devices."""
        return self.plan.global_batch / self.step_s


def estimate(config: RunConfig, workload: Workload, target: Target, gpus: int) -> Estimate:
    """Estimate a run on `gpus` devices, or on the most that can share the global batch.

    The micro-batch is the largest one up to the configured size that splits the batch and fits the memory.

    Raises:
        ConfigError: The training set is smaller than a batch.
    """
    batch = config.schedule.batch_size
    devices = max(n for n in divisors(batch) if n <= gpus)
    share = batch // devices
    sizes = [size for size in reversed(divisors(share)) if size <= config.loop.micro_batch_size]
    memory = {size: memory_bytes(workload, target, devices, size, accumulated=share > size) for size in sizes}
    limit = float("inf") if target.gpu.memory_gib is None else USABLE_MEMORY * target.gpu.memory_gib * GIB
    micro = next((size for size in sizes if memory[size] <= limit), 1)
    loop = replace(config.loop, micro_batch_size=micro)
    plan = make_plan(replace(config, loop=loop), workload.samples_per_epoch, workload.budget, devices)
    muon = muon_flops(workload.muon, devices, target.parallel)
    step_s = (batch * workload.flops_per_sample / devices + muon) / target.flops
    return Estimate(
        gpus=gpus,
        plan=plan,
        memory=memory[micro],
        fits=memory[micro] <= limit,
        step_s=step_s,
        cores=batch / step_s * workload.loader_core_s(micro),
        checkpoint_bytes=workload.states.weights + workload.states.moments,
    )


def memory_bytes(workload: Workload, target: Target, devices: int, micro_batch: int, *, accumulated: bool) -> int:
    """Return the peak memory of a device: at the end of a forward pass, or at the start, before sharding.

    DDP holds all states and a copy of the gradients in its buckets. FSDP2 holds a shard of the states, the weights
    outside of blocks and two blocks (one computes, the next is prefetched) with gradients, and unsharded gradients
    while they are accumulated (arXiv:2304.11277).
    """
    states, saved = workload.states, workload.saved
    sharded = devices if target.parallel == "fsdp2" else 1
    held = sum(-(-part // sharded) for part in (states.weights, states.gradients, states.moments))
    if devices > 1 and target.parallel == "ddp":
        held += states.gradients
    elif devices > 1:
        held += 2 * (states.root + 2 * states.block) + accumulated * states.gradients
    training = held + saved.fixed + micro_batch * saved.per_sample
    return max(training, states.weights)


def muon_flops(shapes: Sequence[Sequence[int]], devices: int, parallel: str) -> int:
    """Return the FLOPs of a Muon step on the device with most of them.

    With DDP every device updates all matrices. FSDP2 shards a stack (E, A, B) by whole matrices, ceil(E / n) of them
    on the first device, and gathers a matrix (A, B) on every device.
    """
    sharded = devices if parallel == "fsdp2" else 1
    return sum(orthogonalize_flops((-(-s[0] // sharded), *s[1:]) if len(s) == 3 else s) for s in shapes)


def assumed_rate(gpu: Gpu, utilization: float | None) -> tuple[float, str]:
    """Return the FLOP/s of a device at a fraction of its peak (None: the usual one), and a description of the rate.

    Raises:
        ConfigError: The fraction is outside (0, 1], or the peak is unknown.
    """
    fraction = ASSUMED_UTILIZATION if utilization is None else utilization
    require("--utilization", fraction, 0 < fraction <= 1, "above 0 and at most 1")
    if gpu.peak_flops is None:
        raise ConfigError(f"the bf16 peak of {gpu.name} is unknown; give the throughput of a run by --measured RUN")
    return fraction * gpu.peak_flops, f"{fraction:.1%} of the bf16 peak, {'given' if utilization else 'assumed'}"


def measured_rate(run: Path, gpu: Gpu, muon: Sequence[Sequence[int]] = (), parallel: str = "ddp") -> tuple[float, str]:
    """Return the FLOP/s of a device from the mean throughput of a run, and a description of the rate.

    The throughput includes whole steps, so the work of Muon counts, and waiting for communication lowers the rate. A
    run on another device counts by its fraction of that device's peak. `muon` and `parallel` describe the run.

    Raises:
        ConfigError: The run has no throughput, or it ran on another device and a peak is unknown.
        DataError: The run folder cannot be read.
    """
    summary = RunFolder(run).summary()
    environment = read_json(run / "env.json", "--measured takes a run folder")
    flops = summary.get("flops_per_sample") or summary.get("flops_per_token")
    if not (flops and summary.get("throughput")):
        raise ConfigError(f"--measured {run}: summary.json has no throughput; take a run with more steps")
    world_size, device = environment["world_size"], environment["device"]
    rate = summary["throughput"] * flops / world_size
    if muon:
        model_flops = summary["flops_total"] / summary["steps"] / world_size
        rate *= 1 + muon_flops(muon, world_size, parallel) / model_flops
    peak = bf16_peak_flops(device)
    if peak is not None and gpu.peak_flops is not None:
        return rate / peak * gpu.peak_flops, f"{rate / peak:.1%} of the bf16 peak, as {run} on {device}"
    if device != gpu.name:
        raise ConfigError(f"--measured {run} ran on {device}; for {gpu.name} the bf16 peaks of both must be known")
    return rate, f"{count(rate)}FLOP/s a device, as {run}"
