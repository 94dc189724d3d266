"""Time and memory of cases that alternate, so that a drifting machine speed does not affect their ratios."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20

WARMUP_ROUNDS = {"cuda": 3, "cpu": 1}
"""Rounds that are not counted, by device type: compilation, optimizer state, memory pools."""

BUSY_BYTES, BUSY_TIMES = 2**29, 16
"""Bytes set to zero, and how often, to occupy a GPU while a run is enqueued."""

COPY_MIB = {"cuda": 1024, "cpu": 256}
"""Size of a copy, by device type: larger than any cache."""

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of a matrix product at full rate, by device type."""

FIRST_RUN_S = 5.0
"""Seconds above which a first run, with its compilation, is printed."""

Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(eq=False)
class Case:
    """Something to measure and, after `measure`, its results.

    Args:
        labels: The first columns of its row.
        run: The timed function.
        items: Items that one run processes, in the table's unit.
        prepare: Called before each run, not timed; its result is the argument of `run`.
        baseline: The case that ratios refer to; None is this one.
        held_bytes: Called after the warm-up; memory between runs that counts in the peak, such as weights.
        notes: Further columns by heading.

    Attributes:
        seconds: One value per round.
        peak_mib: Peak tensor memory of a run in MiB, with `held_bytes`.
    """

    labels: dict[str, str]
    run: Callable[..., object]
    items: float = 1
    prepare: Callable[[], object] | None = None
    baseline: Case | None = None
    held_bytes: Callable[[], int] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def reference(self) -> Case:
        """The baseline."""
        return self.baseline or self

    @property
    def median_s(self) -> float:
        """Median of the rounds in seconds."""
        return statistics.median(self.seconds)

    def time_ratios(self) -> list[float]:
        """Return seconds per item over the baseline's, round by round."""
        pairs = zip(self.seconds, self.reference.seconds, strict=True)
        return [own / other * self.reference.items / self.items for own, other in pairs]

    def call(self) -> Callable[[], object]:
        """Return the prepared run without arguments."""
        return self.run if self.prepare is None else partial(self.run, self.prepare())

    def release(self) -> None:
        """Drop what the run references, such as a model; keep the results."""
        self.run, self.prepare, self.held_bytes = (lambda: None), None, None


def measure(
    cases: Sequence[Case],
    device: torch.device,
    rounds: int,
    *,
    clock: Clock | None = None,
    memory: bool = True,
    warmup: int | None = None,
) -> None:
    """Fill in `seconds` of all cases, alternating in every round, then `peak_mib` if `memory`."""
    clock = clock or wall_seconds
    skipped = WARMUP_ROUNDS[device.type] if warmup is None else warmup
    for number in range(skipped + rounds):
        for case in cases:
            seconds = clock(case.call(), device)
            if number == 0 and seconds > FIRST_RUN_S:
                print(f"first run of {', '.join(case.labels.values())}: {seconds:.0f} s", file=sys.stderr, flush=True)
            if number >= skipped:
                case.seconds.append(seconds)
    if not memory:
        return
    gc.collect()
    gc.freeze()  # speeds up the collection before each run
    for case in cases:
        held = 0 if case.held_bytes is None else case.held_bytes()
        case.peak_mib = held / MIB + peak_memory_mib(case.call(), device)
    gc.unfreeze()


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the host's seconds from an empty queue to an empty queue."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return a GPU's own seconds for `call`; on a CPU, `wall_seconds`.

    The call is enqueued behind other work, so the host's time, which overlaps in training, does not count, and no
    operand is in a cache.
    """
    if device.type != "cuda":
        return wall_seconds(call, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        for _ in range(BUSY_TIMES):
            _ballast(device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


@lru_cache
def _ballast(device: torch.device) -> Tensor:
    return torch.empty(BUSY_BYTES, dtype=torch.uint8, device=device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak of tensor memory in MiB that `call` allocates."""
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler.kineto_results if profiler.profiler else None
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def copy_case(device: torch.device, labels: dict[str, str], mib: int | None = None) -> Case:
    """Return the copy of a large tensor; items are the bytes read and written."""
    source = torch.ones((mib or COPY_MIB[device.type]) * MIB, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Case(labels, lambda: target.copy_(source), items=2 * source.numel())


def product_case(device: torch.device, dtype: torch.dtype, labels: dict[str, str], size: int | None = None) -> Case:
    """Return a product of square matrices; items are floating-point operations, two per multiply-add."""
    size = size or PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return Case(labels, lambda: torch.mm(left, right, out=result), items=2 * size**3)
