"""What a run takes on devices that are not there: memory, time, communication, what is read and what is saved.

Arithmetic on a `Workload`, which a half (vision, language) makes without weights or data. docs/planning.md has the
formulas with their sources, and what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from moa_train.config import RunConfig
from moa_train.devices import Gpu, SavedBytes, bf16_peak_flops, state_bytes
from moa_train.distributed import blocks
from moa_train.errors import require
from moa_train.muon import orthogonalize_flops
from moa_train.plan import ASSUMED_UTILIZATION
from moa_train.progress import WARMUP_STEPS, count, duration
from moa_train.reading import read_json
from moa_train.run_folder import RunFolder
from moa_train.schedule import Budget, Plan, divisors, make_plan

LARGEST_BATCH = 10**9

GIB = 2**30

USABLE_MEMORY = 0.9
"""Part of a device's memory that may be planned for: the rest is the driver's, the allocator's, and of kernels that
work on something for a moment.
"""

LARGEST_RATE = 1e20
"""FLOP/s that no device comes to; a damaged summary.json may say more than can be reckoned with."""

BACKWARD_PART = 2 / 3
"""Of a step's compute, during which gradients can be reduced (see `moa_train.plan.TRAINING_FLOPS_PER_FORWARD`)."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that a model and its optimizer hold, whole.

    Attributes:
        weights, gradients, moments: Of the optimizer AdamW's two moments a parameter, Muon's one where it steps.
        block: Weights of the largest block, which FSDP2 gathers at a time.
        root: Weights outside of blocks, which FSDP2 gathers together.
    """

    weights: int
    gradients: int
    moments: int
    block: int
    root: int


def count_states(model: nn.Module, with_one_moment: Sequence[str] = ()) -> States:
    """Count `model`, on any device ("meta" too); `with_one_moment` are the parameters that Muon steps.

    Blocks are those of `moa_train.distributed.blocks`, which a run gathers one at a time.
    """

    def size(parameters: Sequence[nn.Parameter]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    weights = size([*model.parameters()])
    gradients = size([p for p in model.parameters() if p.requires_grad])
    parts = [[*block.parameters()] for block in blocks(model)]
    in_blocks = {parameter: None for part in parts for parameter in part}
    return States(
        weights=weights,
        gradients=gradients,
        moments=state_bytes(model, with_one_moment) - weights - gradients,
        block=max(map(size, parts), default=0),
        root=weights - size([*in_blocks]),
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the loader does for one sample.

    Attributes:
        stored_bytes: Read from the shards.
        core_s: Seconds of one core to make it a part of a batch; 0 where that is nothing beside the step.
        workers: Processes of the loader a device, as configured.
        decode_s: Seconds besides, which `repeats` samples share, as they do stored_bytes, if they are in one
            micro-batch.
        repeats: Samples in a row that are made of the same stored bytes.
    """

    stored_bytes: float
    core_s: float
    workers: int
    decode_s: float = 0.0
    repeats: int = 1

    def in_batches(self, size: int) -> Reading:
        """Return the same with what is shared counted as a sample's part of it, in micro-batches of `size`.

        Each micro-batch begins at a multiple of `size`, and reads what it needs itself.
        """
        part = (size + self.repeats - math.gcd(size, self.repeats)) / (self.repeats * size)
        core_s = self.core_s + part * self.decode_s
        return replace(self, stored_bytes=part * self.stored_bytes, core_s=core_s, decode_s=0.0, repeats=1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run asks for, whatever it runs on.

    Attributes:
        title: The model in words.
        parameters: Counts by part, "total" among them.
        unit, units_per_sample: As `moa_train.task.Task`'s.
        samples_per_epoch: Training samples.
        budget: Turns the steps of an epoch into those of the run.
        flops_per_sample: In training, forward and backward.
        muon: Shapes of the matrices (A, B) and stacks (E, A, B) that Muon steps; none with AdamW alone.
        assumed: What was taken for granted, a sentence each.
    """

    title: str
    parameters: dict[str, int]
    unit: str
    units_per_sample: int
    samples_per_epoch: int
    budget: Callable[[int], Budget]
    flops_per_sample: int
    states: States
    saved: SavedBytes
    reading: Reading
    muon: tuple[tuple[int, ...], ...] = ()
    assumed: tuple[str, ...] = ()

    def as_tree(self) -> dict[str, Any]:
        """Return everything but the budget in JSON types."""
        tree = {**asdict(replace(self, saved=SavedBytes(0, 0))), "saved": self.saved._asdict()}
        return {name: value for name, value in tree.items() if name != "budget"}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned for.

    Attributes:
        gpu: Every device.
        flops: What a device is taken to do, FLOP/s; None where nothing is known.
        flops_source: Where that is from, in words.
        gpus_per_node: Devices that `Gpu.link_gb_s` connects.
        network_gb_s: Bandwidth of a node to the others in one direction, 1e9 bytes/s.
        disk_gb_s: At which a checkpoint is written, 1e9 bytes/s.
        parallel: ddp, a whole copy on each device, or fsdp2, everything sharded and gathered block by block.
    """

    gpu: Gpu
    flops: float | None
    flops_source: str
    gpus_per_node: int = 8
    network_gb_s: float = 400.0
    disk_gb_s: float = 1.0
    parallel: Literal["ddp", "fsdp2"] = "ddp"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the end of a forward pass, when most is held in training.

    Attributes:
        start: What is held before that, when a run measures what a sample costs: the weights, whole whatever is
            sharded later, and what two samples keep.
        limit: What may be planned for; None where the device's memory is not known.
    """

    weights: int
    gradients: int
    moments: int
    communication: int
    activations: int
    start: int
    limit: int | None

    @property
    def training(self) -> int:
        """What training holds."""
        return self.weights + self.gradients + self.moments + self.communication + self.activations

    @property
    def total(self) -> int:
        """The most that is held."""
        return max(self.training, self.start)

    @property
    def fits(self) -> bool:
        """Whether the device has so much; a device of unknown memory has."""
        return self.limit is None or self.total <= self.limit


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One run on one number of devices.

    Attributes:
        gpus: Devices that were asked for; `plan.world_size` are used.
        compute_s, communication_s, exposed_s: Of a step: the model's products alone; moving bytes alone; what of the
            latter cannot hide behind the former at the best. None where the device's rate or links are not known.
        muon_s: Of a step, after its backward pass: Muon's products; 0 without Muon.
        checkpoint_bytes, saves, kept: Of one checkpoint; how many are written; how many lie there at the end.
        notes: What the plan changes or cannot do, a sentence each.
    """

    gpus: int
    plan: Plan
    memory: Memory
    compute_s: float | None
    communication_s: float | None
    exposed_s: float | None
    muon_s: float | None
    reading: Reading
    checkpoint_bytes: int
    saves: int
    kept: int
    write_s: float
    notes: tuple[str, ...]

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, communication hidden as far as it can be."""
        if self.compute_s is None or self.muon_s is None:
            return None
        return self.compute_s + (self.exposed_s or 0.0) + self.muon_s

    @property
    def hours(self) -> float | None:
        """Of the whole run, where the loader keeps up; validation and saving left out."""
        return None if self.step_s is None else self.plan.total_steps * self.step_s / 3600

    @property
    def samples_per_s(self) -> float | None:
        """Of all devices."""
        return None if self.step_s is None else self.plan.global_batch / self.step_s

    @property
    def shard_bytes_per_s(self) -> float | None:
        """Read by all devices."""
        return None if self.samples_per_s is None else self.samples_per_s * self.reading.stored_bytes

    @property
    def cores(self) -> float | None:
        """Cores, on all nodes, that make samples as fast as they are used."""
        return None if self.samples_per_s is None else self.samples_per_s * self.reading.core_s

    @property
    def loader_hours(self) -> float:
        """Hours that the configured workers need for all samples."""
        workers = max(1, self.reading.workers) * self.plan.world_size
        return self.plan.total_steps * self.plan.global_batch * self.reading.core_s / workers / 3600

    def as_tree(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        derived = ("step_s", "hours", "samples_per_s", "shard_bytes_per_s", "cores", "loader_hours")
        memory = {**asdict(self.memory), "total": self.memory.total, "fits": self.memory.fits}
        return {**asdict(self), "memory": memory, **{name: getattr(self, name) for name in derived}}


def forecast(config: RunConfig, workload: Workload, cluster: Cluster, gpus: int) -> Forecast:
    """Plan a run on `gpus` devices, with the largest micro-batch, up to the configured one, that splits and fits.

    Where so many devices cannot share the global batch, the most that can are planned for.

    Raises:
        ValueError: `gpus` is below 1, or the training set is smaller than a batch, or that above `LARGEST_BATCH`.
    """
    require("gpus", gpus, gpus >= 1, "1 or above")
    batch, wanted = config.schedule.batch_size, config.loop.micro_batch_size
    require("schedule.batch_size", batch, batch <= LARGEST_BATCH, f"at most {LARGEST_BATCH:,}")
    devices = max(n for n in divisors(batch) if n <= gpus)
    share = batch // devices
    sizes = [size for size in reversed(divisors(share)) if size <= wanted]
    held = {size: _memory(workload, cluster, devices, size, share // size) for size in sizes}
    micro = next((size for size in sizes if held[size].fits), 1)
    loop = replace(config.loop, micro_batch_size=micro)
    plan = make_plan(replace(config, loop=loop), workload.samples_per_epoch, workload.budget, devices)
    compute, communication, exposed = _seconds(workload, cluster, plan)
    kept, saves = _kept(
        plan, config.checkpoint.interval, config.checkpoint.keep_latest, config.checkpoint.keep_interval
    )
    checkpoint = workload.states.weights + workload.states.moments
    return Forecast(
        gpus=gpus,
        plan=plan,
        memory=held[micro],
        compute_s=compute,
        communication_s=communication,
        exposed_s=exposed,
        muon_s=_muon_seconds(workload, cluster, devices),
        reading=workload.reading.in_batches(micro),
        checkpoint_bytes=checkpoint,
        saves=saves,
        kept=kept,
        write_s=checkpoint / (cluster.disk_gb_s * 1e9),
        notes=_notes(gpus, devices, batch, wanted, sizes[0], micro, held[micro]),
    )


def _memory(workload: Workload, cluster: Cluster, devices: int, micro: int, accumulation: int) -> Memory:
    """Bytes on one device. DDP: everything whole, and as much as the gradients in its buckets. FSDP2: a share of it;
    gathered are what lies outside of blocks and two blocks (one computes, the next is on its way), each with its
    gradient; and gradients that are accumulated stay whole until the last micro-batch.
    """
    states = workload.states
    sharded = devices if cluster.parallel == "fsdp2" else 1
    if devices == 1:
        communication = 0
    elif cluster.parallel == "ddp":
        communication = states.gradients
    else:
        communication = 2 * (states.root + 2 * states.block) + (states.gradients if accumulation > 1 else 0)
    limit = None if cluster.gpu.memory_gib is None else int(USABLE_MEMORY * cluster.gpu.memory_gib * GIB)
    return Memory(
        weights=-(-states.weights // sharded),
        gradients=-(-states.gradients // sharded),
        moments=-(-states.moments // sharded),
        communication=communication,
        activations=workload.saved.fixed + micro * workload.saved.per_sample,
        start=states.weights + workload.saved.fixed + 2 * workload.saved.per_sample,
        limit=limit,
    )


def _seconds(workload: Workload, cluster: Cluster, plan: Plan) -> tuple[float | None, float | None, float | None]:
    """A step's compute, communication, and the part of the latter that cannot hide behind the former.

    A ring moves (n - 1) / n of the bytes in and out of every device for a reduce-scatter or an all-gather, twice that
    for an all-reduce (NCCL's notion of bus bandwidth), at the slowest link on its way.
    """
    compute = None
    if cluster.flops is not None:
        compute = plan.global_batch * workload.flops_per_sample / (cluster.flops * plan.world_size)
    if plan.world_size == 1:
        return compute, 0.0, 0.0
    network = cluster.network_gb_s if plan.world_size > cluster.gpus_per_node else None
    slowest = min((rate for rate in (cluster.gpu.link_gb_s, network) if rate is not None), default=None)
    if slowest is None or compute is None:
        return compute, None, None
    states, ring = workload.states, (plan.world_size - 1) / plan.world_size
    if cluster.parallel == "ddp":
        moved, beside = 2 * states.gradients, BACKWARD_PART * compute / plan.accumulation
    else:  # weights are gathered for forward and backward of each micro-batch
        moved, beside = 2 * plan.accumulation * states.weights + states.gradients, compute
    communication = ring * moved / (slowest * 1e9)
    return compute, communication, max(0.0, communication - beside)


def muon_flops(shapes: Sequence[Sequence[int]], devices: int, parallel: str) -> int:
    """Return the FLOPs of Muon's step on the device that has the most of them.

    DDP: all of them, on every device. FSDP2: a stack (E, A, B) is shared in whole matrices, of which the first device
    has ceil(E / n), as torch splits it; a matrix (A, B) is gathered, and orthogonalized on every device.
    """
    sharded = devices if parallel == "fsdp2" else 1
    held = [(-(-shape[0] // sharded), *shape[1:]) if len(shape) == 3 else shape for shape in shapes]
    return sum(map(orthogonalize_flops, held))


def _muon_seconds(workload: Workload, cluster: Cluster, devices: int) -> float | None:
    flops = muon_flops(workload.muon, devices, cluster.parallel)
    if not flops:
        return 0.0
    return None if cluster.flops is None else flops / cluster.flops


def _kept(plan: Plan, save_every: int, keep: int, keep_every: int | None) -> tuple[int, int]:
    """Checkpoints that lie there at the end, and how many are written in all; see `moa_train.checkpoint.save`."""
    whole = -(-plan.total_steps // save_every)  # the last step counts as due
    halfway = -(-(plan.total_steps - save_every // 2) // save_every) if save_every > 1 else 0  # each lasts to the next
    dropped = max(0, whole - keep) * save_every if keep_every else 0  # the step up to which only those for good stay
    return min(keep, whole) + (dropped // keep_every if keep_every else 0), whole + max(0, halfway)


def _notes(gpus: int, devices: int, batch: int, wanted: int, fitting: int, micro: int, held: Memory) -> tuple[str, ...]:
    """What the plan changes: `wanted` is the configured micro-batch, `fitting` splits, `micro` has memory too."""
    notes = []
    if devices < gpus:
        notes.append(f"{gpus} devices cannot share schedule.batch_size {batch:,} evenly: planned for {devices}")
    if fitting < wanted:
        notes.append(
            f"loop.micro_batch_size {wanted} does not split {batch:,} over {devices} devices: "
            f"--loop.micro_batch_size {fitting} does"
        )
    if micro < fitting:
        outcome = "fits" if held.fits else "does not fit either"
        notes.append(f"a micro-batch of {fitting} does not fit the memory: --loop.micro_batch_size {micro} {outcome}")
    elif not held.fits:
        notes.append(f"a micro-batch of {micro} does not fit the memory")
    if held.limit is not None and held.start > held.limit:
        notes.append("at the start every device holds all weights and two samples, even with fsdp2: take larger GPUs")
    elif not held.fits:
        notes.append("what may help: --parallel fsdp2, more or larger GPUs, model.gradient_checkpointing (language)")
    return tuple(notes)


def assumed_rate(gpu: Gpu, utilization: float | None) -> tuple[float | None, str]:
    """Return a device's rate in FLOP/s at a part of its peak (the usual one for None), and in words where it is from.

    Raises ValueError for a part outside (0, 1].
    """
    part = ASSUMED_UTILIZATION if utilization is None else utilization
    require("utilization", part, 0 < part <= 1, "above 0 and at most 1")
    if gpu.peak_flops is None:
        return None, f"no peak rate is known for {gpu.name}; --measured RUN tells the time"
    how = "assumed" if utilization is None else "given"
    return part * gpu.peak_flops, f"{part:.1%} of the bf16 peak, {how}"


def measured_rate(run: Path, gpu: Gpu, muon: Sequence[Sequence[int]] = (), parallel: str = "ddp") -> tuple[float, str]:
    """Return a device's rate in FLOP/s from the mean throughput that a run recorded, and in words where it is from.

    That throughput is of whole steps. So the rate counts the products of whole steps, the model's and Muon's: a plan
    for as many devices comes to the recorded time again, and one for others has Muon's work as it is there. Waiting
    of the run for links makes the rate lower; a plan that waits too has it twice.
    A run on another device than `gpu` counts by the part of its peak that it came to.

    Args:
        run: The run's folder.
        gpu: The device that is planned for.
        muon: Shapes of what Muon stepped in the run, as `Workload.muon`.
        parallel: How the run was spread, which its folder does not say; see `Cluster.parallel`.

    Raises:
        ValueError: `run` is no run folder with recorded speed, or it ran on another device whose peak is not known.
    """
    try:
        summary = RunFolder(run).summary()
        environment = read_json(run / "env.json", "the run's command writes it")
        flops = next(summary[key] for key in ("flops_per_sample", "flops_per_token") if key in summary)
        devices = int(environment["world_size"])
        rate = float(summary["throughput"]) * float(flops) / devices
        if muon:
            model_flops = float(summary["flops_total"]) / int(summary["steps"]) / devices
            rate *= 1 + muon_flops(muon, devices, parallel) / model_flops
        device = str(environment["device"])
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, StopIteration) as error:
        raise ValueError(
            f"measured is {str(run)!r}; it must be a run folder with summary.json and env.json, of more than the "
            f"{WARMUP_STEPS} steps of warm-up, which are not timed ({error!r})"
        ) from error
    told = f"a run folder whose summary.json has a throughput above 0, at most {LARGEST_RATE:.0e} FLOP/s a device"
    require("measured", str(run), 0 < rate <= LARGEST_RATE, told)
    peak, with_muon = bf16_peak_flops(device), ", Muon's work counted" if muon else ""
    if peak is not None and gpu.peak_flops is not None:
        return rate / peak * gpu.peak_flops, f"{rate / peak:.1%} of the bf16 peak{with_muon}, as {run} on {device}"
    if device == gpu.name:
        return rate, f"{count(rate)}FLOP/s a device{with_muon}, as {run}"
    raise ValueError(
        f"measured is {str(run)!r}, which ran on {device}; the peak of that or of {gpu.name} is not known, so that "
        "the one does not tell of the other"
    )


def describe_workload(workload: Workload) -> dict[str, str]:
    """Return the lines that hold for any number of devices, title to text."""
    per_unit = workload.flops_per_sample / workload.units_per_sample
    saved, states = workload.saved, workload.states
    lines = {
        "model": workload.title,
        "parameters": ", ".join(f"{name} {count(number)}" for name, number in workload.parameters.items()),
        "work": f"{count(per_unit)}FLOPs a {workload.unit} in training"
        + (f"; {count(muon_flops(workload.muon, 1, 'ddp'))}FLOPs a step for Muon" if workload.muon else ""),
        "held": (
            f"{_gib(states.weights)} of weights, {_gib(states.gradients)} of gradients, {_gib(states.moments)} of "
            f"moments; kept for backward, eager: {_gib(saved.fixed)} and {saved.per_sample / 2**20:,.1f} MiB a sample"
        ),
    }
    return lines | ({"assumed": "; ".join(workload.assumed)} if workload.assumed else {})


def describe_forecast(found: Forecast, workload: Workload, cluster: Cluster) -> dict[str, str]:
    """Return the lines of one number of devices, title to text."""
    plan, memory = found.plan, found.memory
    units = plan.total_steps * plan.global_batch * workload.units_per_sample
    lines = {
        "devices": f"{plan.world_size} x {cluster.gpu.name}, {cluster.parallel if plan.world_size > 1 else 'alone'}",
        "batch": f"{plan.global_batch:,} = {plan.accumulation} accumulated x {plan.world_size} x {plan.micro_batch}",
        "steps": f"{plan.total_steps:,}, {plan.warmup_steps:,} of warm-up; {units:,} {workload.unit} in all",
        "memory": _memory_text(memory, cluster.gpu),
        "time": _time_text(found, cluster),
        "links": _links_text(found, cluster),
        "loader": _loader_text(found, cluster),
        "checkpoints": (
            f"{_gib(found.checkpoint_bytes)} each, {found.kept} of {found.saves:,} kept "
            f"({_gib(found.kept * found.checkpoint_bytes)}); one takes {duration(found.write_s)} at "
            f"{cluster.disk_gb_s:g} GB/s"
        ),
    }
    return lines | ({"note": "; ".join(found.notes)} if found.notes else {})


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _memory_text(memory: Memory, gpu: Gpu) -> str:
    parts = {name: value for name, value in asdict(memory).items() if name not in ("start", "limit") and value}
    listed = ", ".join(f"{name} {value / GIB:,.2f}" for name, value in parts.items())
    if memory.start > memory.training:
        listed = f"at the start, before anything is sharded; in training {listed}"
    if memory.limit is None:
        return f"about {_gib(memory.total)} a device: {listed}"
    verdict = "fits" if memory.fits else "does NOT fit"
    return f"about {_gib(memory.total)} a device, {verdict} {USABLE_MEMORY:.0%} of {gpu.memory_gib:g} GiB: {listed}"


def _time_text(found: Forecast, cluster: Cluster) -> str:
    if found.hours is None or found.compute_s is None or found.step_s is None:
        return cluster.flops_source
    muon = f"{1000 * found.muon_s:,.1f} Muon, " if found.muon_s else ""
    return (
        f"{duration(3600 * found.hours)} at {cluster.flops_source}: {1000 * found.step_s:,.1f} ms a step, of which "
        f"{1000 * found.compute_s:,.1f} compute, {muon}{1000 * (found.exposed_s or 0):,.1f} waiting for links"
    )


def _links_text(found: Forecast, cluster: Cluster) -> str:
    if found.plan.world_size == 1:
        return "none are needed"
    if found.communication_s is None or found.exposed_s is None:
        return "not known"
    hidden = found.communication_s - found.exposed_s
    across = found.plan.world_size > cluster.gpus_per_node
    rates = f"{cluster.gpu.link_gb_s:g} GB/s in a node" + (f", {cluster.network_gb_s:g} out of it" if across else "")
    return f"{1000 * found.communication_s:,.1f} ms a step at {rates}; {1000 * hidden:,.1f} can hide behind compute"


def _loader_text(found: Forecast, cluster: Cluster) -> str:
    if found.samples_per_s is None or found.shard_bytes_per_s is None or found.cores is None:
        return f"{found.reading.stored_bytes:,.0f} bytes a sample"
    nodes = -(-found.plan.world_size // cluster.gpus_per_node)
    rate = found.shard_bytes_per_s / 1e6
    text = f"{found.samples_per_s:,.0f} samples/s, {rate:,.1f} MB/s from shards ({rate / nodes:,.1f} a node)"
    if not found.reading.core_s:
        return f"{text}; no decoding"
    text += f", {found.cores:,.0f} cores ({found.cores / found.plan.world_size:,.1f} a device)"
    if found.hours is not None and found.loader_hours > found.hours:
        hours = duration(3600 * found.loader_hours)
        text += f"; data.workers {found.reading.workers} make the run last {hours} at least"
    return text


COLUMNS = (
    "GPUs",
    "micro-batch x accumulated",
    "memory a GPU",
    "step, ms",
    "links, ms",
    "waiting, ms",
    "Muon, ms",
    "hours",
    "samples/s",
    "shards, MB/s",
    "cores",
    "checkpoint",
)


def table(forecasts: Sequence[Forecast]) -> list[tuple[str, ...]]:
    """Return rows of text, the columns' names first, one for each forecast; "–" stands where nothing is known.

    Muon has a column where it steps something.
    """
    rows, by_muon = [COLUMNS, *map(_row, forecasts)], any(found.muon_s != 0 for found in forecasts)
    shown = [column for column, name in enumerate(COLUMNS) if by_muon or name != "Muon, ms"]
    return [tuple(row[column] for column in shown) for row in rows]


def _row(found: Forecast) -> tuple[str, ...]:
    def number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
        return "–" if value is None else f"{value * factor:,.{digits}f}"

    plan, memory = found.plan, found.memory
    return (
        str(found.gpus) if plan.world_size == found.gpus else f"{found.gpus} ({plan.world_size} used)",
        f"{plan.micro_batch} x {plan.accumulation}",
        f"{memory.total / GIB:,.1f} GiB" + ("" if memory.fits else ", does not fit"),
        number(found.step_s, 1000),
        number(found.communication_s, 1000),
        number(found.exposed_s, 1000),
        number(found.muon_s, 1000),
        number(found.hours, digits=2),
        number(found.samples_per_s, digits=0),
        number(found.shard_bytes_per_s, 1e-6),
        number(found.cores, digits=0),
        f"{found.checkpoint_bytes / GIB:,.2f} GiB",
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with columns flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first row its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---:|" * len(rows[0]), *body])
