"""Comparison of training runs: groups over seeds, methods over learning rates, and their differences.

    Run         one run folder
    RunGroup    runs that differ in their seed only
    Method      run groups that differ in their peak learning rate only, usually one FFN; represented by its best group,
                the one with the lowest mean final validation loss

The method of the first run is the baseline. With models of several sizes, its FFN is the baseline at each size. All
losses are measured on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moa_eval.training.configuration import config_difference
from moa_eval.training.intervals import UNKNOWN, Interval, by_seed, difference, mean, quotient
from moa_eval.training.runs import Run, RunKind

SHOWN_RUNS = 8
"""Number of runs that a figure can show at once and keep distinguishable."""


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs that differ in their seed only.

    `end` counts images or tokens at the last validation of the method's furthest run.
    """

    label: str
    runs: tuple[Run, ...]
    end: float

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.runs[0].peak_lr

    @property
    def diverged(self) -> list[Run]:
        """The runs with a non-finite loss or gradient."""
        return [run for run in self.runs if run.diverged_at is not None]

    @property
    def complete(self) -> list[Run]:
        """The runs that reached the end with finite losses."""
        return [run for run in self.runs if run.is_usable and run.end == self.end]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that neither diverged nor reached the end: their last loss is not final."""
        return [run for run in self.runs if run.diverged_at is None and run not in self.complete]

    def final_losses(self, loss: str) -> dict[int, float]:
        """Return the final loss of the complete runs by seed."""
        return by_seed(self.complete, [run.final(loss) for run in self.complete])

    def mean_loss(self, loss: str) -> float:
        """Return the mean final loss over seeds."""
        return mean(self.final_losses(loss).values())


@dataclass(frozen=True, eq=False)
class Method:
    """Run groups that differ in their peak learning rate only.

    Attributes:
        label: Name on the page, such as "qd-MoA, dense-0.25b"; `name` is the label without the size.
        size: Name of the model size; empty if all methods have the same size.
        family: Key that is equal for one FFN at all sizes.
        groups: Run groups by rising learning rate.
        best: See `best_group`.
        baseline: The method that this one is compared with; None for a baseline.
    """

    label: str
    name: str
    size: str
    family: str
    groups: tuple[RunGroup, ...]
    best: RunGroup | None
    baseline: Method | None
    index: int

    @property
    def reference(self) -> Method:
        """The baseline; of a baseline, itself."""
        return self.baseline or self

    @property
    def is_tuned(self) -> bool:
        """Whether several learning rates were tried."""
        return len(self.groups) > 1

    @property
    def best_rate(self) -> float:
        """The best learning rate; NaN without a best group."""
        return self.best.learning_rate if self.best else math.nan

    @property
    def edge(self) -> str:
        """Whether the best learning rate is the "lowest" or "highest" tried; "" inside the range or without tuning."""
        if not self.is_tuned or self.best is None:
            return ""
        return {self.groups[0]: "lowest", self.groups[-1]: "highest"}.get(self.best, "")

    @property
    def runs(self) -> list[Run]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def best_runs(self) -> list[Run]:
        """The runs of the best group; without a best group, all runs."""
        return self.runs if self.best is None else [*self.best.runs]

    @property
    def complete(self) -> list[Run]:
        """The complete runs of the best group."""
        return [] if self.best is None else self.best.complete

    @property
    def shown_run(self) -> Run:
        """The run that is shown where there is room for one: the first of the best group that did not diverge."""
        runs = (self.best or self.groups[0]).runs
        return next((run for run in runs if run.diverged_at is None), runs[0])


@dataclass(frozen=True, eq=False)
class Contrast:
    """A run group of a method against one of its baseline, after the same number of images or tokens.

    `seen` is that number, None without a common validation. Losses are by seed, without diverged runs.
    """

    method: Method
    group: RunGroup
    baseline: RunGroup
    seen: int | None
    losses: dict[int, float]
    baseline_losses: dict[int, float]

    @cached_property
    def interval(self) -> Interval:
        """The mean difference, group minus baseline."""
        return UNKNOWN if self.seen is None else difference(self.losses, self.baseline_losses)

    def adjusted(self, comparisons: int) -> Interval:
        """Return the difference with an interval that holds jointly with those of all `comparisons`."""
        return difference(self.losses, self.baseline_losses, comparisons)

    @property
    def relative(self) -> float:
        """The mean difference as a fraction of the baseline's mean."""
        return quotient(self.interval.mean, self.baseline_mean)

    @property
    def columns(self) -> dict[str, float]:
        """The difference and its interval as columns of a table."""
        difference, low, high, _ = self.interval
        return {"difference": difference, "relative": self.relative, "low_95": low, "high_95": high}

    @property
    def mean(self) -> float:
        """The group's mean loss over seeds."""
        return mean(self.losses.values())

    @property
    def baseline_mean(self) -> float:
        """The baseline's mean loss over seeds."""
        return mean(self.baseline_losses.values())


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side; the baseline comes first, each further baseline before its alternatives.

    Attributes:
        metric: Loss of the verdict, a column of validation rows: the baseline's training objective.
        incomparable: Reasons why the losses are not comparable, one line each.
    """

    methods: tuple[Method, ...]
    metric: str
    incomparable: tuple[str, ...]

    @cached_property
    def runs(self) -> list[Run]:
        """The runs by method, learning rate and seed."""
        return [run for method in self.methods for run in method.runs]

    @property
    def kind(self) -> RunKind:
        """What all runs train."""
        return self.runs[0].kind

    @cached_property
    def evaluations(self) -> list[str]:
        """Names of what evaluators measured in any run."""
        return sorted({name for run in self.runs for name in run.evaluations})

    @property
    def groups(self) -> list[RunGroup]:
        """The run groups of all methods."""
        return [group for method in self.methods for group in method.groups]

    @property
    def baseline(self) -> Method:
        """The first method, which is a baseline."""
        return self.methods[0]

    @property
    def alternatives(self) -> list[Method]:
        """The methods that are compared with another method."""
        return [method for method in self.methods if method.baseline is not None]

    @cached_property
    def differing(self) -> dict[str, list[Any]]:
        """Config keys that differ, with one value per run."""
        return config_difference([run.config for run in self.runs])

    @property
    def has_sizes(self) -> bool:
        """Whether there is a baseline per model size."""
        return any(method.baseline is None for method in self.methods[1:])

    @property
    def tuned(self) -> list[Method]:
        """The methods with several learning rates."""
        return [method for method in self.methods if method.is_tuned]

    @cached_property
    def shown(self) -> list[Run]:
        """The runs that figures show at first: all runs if they are few, else those of the best groups."""
        best = [run for method in self.methods if method.best for run in method.best.runs]
        return self.runs if len(self.runs) <= SHOWN_RUNS or not best else best

    @property
    def hidden(self) -> list[int]:
        """Indices of the runs that figures do not show at first."""
        return [run.index for run in self.runs if run not in self.shown]

    def contrasts(self, loss: str) -> list[Contrast]:
        """Return the best group of every alternative against its baseline's, where both have one."""
        return [
            contrast(method, method.best, method.reference.best, loss)
            for method in self.alternatives
            if method.best and method.reference.best
        ]

    def equal_rates(self, loss: str) -> list[Contrast]:
        """Return every group of an alternative against its baseline's of the same learning rate, where it has one."""
        return [
            contrast(method, group, other, loss)
            for method in self.alternatives
            for group in method.groups
            for other in method.reference.groups
            if group.learning_rate == other.learning_rate
        ]


def contrast(method: Method, group: RunGroup, baseline: RunGroup, loss: str) -> Contrast:
    """Return the contrast of two groups in one loss, at the last validation that their runs share.

    Unfinished seeds are left out of a group that has complete ones.
    """
    own, other = (side.complete or [run for run in side.runs if run.is_usable] for side in (group, baseline))
    common: set[float] = set()
    if own and other:
        common = set.intersection(*(set(run.validation[run.kind.counter]) for run in own + other))
    if not common:
        return Contrast(method, group, baseline, None, {}, {})
    at = max(common)
    losses, baseline_losses = (by_seed(side, [run.loss_at(loss, at) for run in side]) for side in (own, other))
    return Contrast(method, group, baseline, int(at), losses, baseline_losses)


def best_group(groups: Sequence[RunGroup], loss: str) -> RunGroup | None:
    """Return the group that represents a method; None without one.

    It has the lowest mean final loss among groups without a diverged run that have a run at the end of the method's
    training. The only group of a method represents it as soon as one of its runs is usable.
    """
    if len(groups) == 1:
        return groups[0] if any(run.is_usable for run in groups[0].runs) else None
    candidates = [group for group in groups if group.complete and not group.diverged]
    return min(candidates, key=lambda group: group.mean_loss(loss), default=None)
