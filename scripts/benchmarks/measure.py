"""Seconds and memory of cases that take turns, so that a machine whose speed drifts does not decide their ratios."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
WARMUP = {"cuda": 3, "cpu": 1}
"""Rounds that are not counted, by type of device: compilation, the optimizer's state, the allocator's pools."""

BUSY_BYTES, BUSY_TIMES = 2**29, 16
"""What occupies a GPU while a run is put into its queue: so many bytes set to zero, so often. Milliseconds, and more
bytes than a cache holds."""

Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(eq=False)
class Case:
    """Something to measure and, after `measure`, what was measured.

    Args:
        labels: the first columns of its line.
        run: what is timed.
        items: what one run gets through, in the table's unit.
        prepare: called before each run and not timed; `run` then takes its result.
        baseline: the case that ratios refer to; None: this one.
        held_bytes: called after the warm-up; memory held between runs that counts in the peak, such as weights.
        notes: further columns, by head.

    Attributes:
        seconds: one value a round.
        peak_mib: the most tensor memory that a run held, in MiB, beyond what was there before, and `held_bytes`.
    """

    labels: dict[str, str]
    run: Callable[..., object]
    items: float = 1
    prepare: Callable[[], object] | None = None
    baseline: "Case | None" = None
    held_bytes: Callable[[], int] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def reference(self) -> "Case":
        """The baseline."""
        return self.baseline or self

    @property
    def median_s(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    def time_ratios(self) -> list[float]:
        """Seconds an item over the baseline's, round by round."""
        pairs = zip(self.seconds, self.reference.seconds, strict=True)
        return [own / other * self.reference.items / self.items for own, other in pairs]

    def call(self) -> Callable[[], object]:
        """The run without arguments, prepared."""
        return self.run if self.prepare is None else partial(self.run, self.prepare())

    def release(self) -> None:
        """Let go of what the run holds, such as a model; the measurements stay."""
        self.run, self.prepare, self.held_bytes = (lambda: None), None, None


def percentile(values: Sequence[float], percent: int) -> float:
    """Inclusive percentile; a single value is its own."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from an empty queue to an empty queue: the host's part counts where the device waits for it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a GPU takes for `call` alone: it is enqueued behind other work, so that the host's part, which
    runs ahead in training, does not count, and finds none of its operands in a cache. On a CPU `wall_seconds`.
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


def measure(
    cases: Sequence[Case],
    device: torch.device,
    rounds: int,
    *,
    clock: Clock = wall_seconds,
    memory: bool = True,
    warmup: int | None = None,
) -> None:
    """Fill in `seconds` of all cases, which take turns in every round, and then `peak_mib` if wanted."""
    skipped = WARMUP.get(device.type, 1) if warmup is None else warmup
    for number in range(skipped + rounds):
        for case in cases:
            seconds = clock(case.call(), device)
            if number >= skipped:
                case.seconds.append(seconds)
    if not memory:
        return
    gc.collect()
    gc.freeze()  # what is there stays; collecting before each run is quick then
    for case in cases:
        held = 0 if case.held_bytes is None else case.held_bytes()
        case.peak_mib = held / MIB + peak_memory_mib(case.call(), device)
    gc.unfreeze()


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float:
    """Largest tensor memory that the call holds beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler.kineto_results if profiler.profiler else None
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB
