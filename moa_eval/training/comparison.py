"""What a set of runs says: who competes, at which rate, by how much they differ, and how sure that is.

    run          one run folder
    arm          runs that differ in their seed only
    contender    arms that differ in their peak rate only: usually one FFN. Its best arm, by which it is compared, is
                 the one with the lowest mean final validation loss

The first run's contender is the baseline; with models of several sizes its FFN is the baseline at each of them. All
losses are losses on held-out data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from moa_eval.page import formatting
from moa_eval.page.formatting import show, spell
from moa_eval.training.configuration import BUDGETS, WIDENED, canonical, config_difference, flatten, role, size_part
from moa_eval.training.runs import Kind, Run
from moa_eval.training.seeds import Interval, by_seed, difference, mean, quotient
from moa_eval.training.sizes import baselines, families, size_keys, sizes

_AMONG_CONTENDER = ("identity", "bookkeeping", "peak rate")  # in what runs of one contender may differ
T = TypeVar("T")
SHOWN_RUNS = 8  # so many runs can all be told apart in one figure

FFN_NAMES = {
    "relu2": "ReLU²", "gelu": "GELU", "la": "LA", "moa": "MoA", "swiglu": "SwiGLU", "onela": "one-LA",
    "bila": "bi-LA", "qdla": "qd-LA", "onemoa": "one-MoA", "bimoa": "bi-MoA", "qdmoa": "qd-MoA",
}  # fmt: skip


class NotComparableError(ValueError):
    """The runs cannot be compared: one is given twice, or they differ in what must be the same."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Attributes:
        label: How the page calls them, such as "qd-MoA" or "qd-MoA, lr 1.2e-3".
        runs: Their positions in the list of runs.
        rate: Their peak learning rate.
    """

    label: str
    runs: tuple[int, ...]
    rate: float


@dataclass(frozen=True)
class Contender:
    """Arms that differ in their peak learning rate only.

    Attributes:
        label: How the page calls them, such as "qd-MoA".
        arms: Their positions in the list of arms, by rising rate.
        best: The arm with the lowest mean final loss among those of which no run diverged and at least one got as far
            as any run of the contender did; the mean is over these. None if there is no such arm. A contender's only
            arm is its best as long as one run of it has a finite loss.
        chosen: Whether there was more than one rate to choose from.
        baseline: The position of the contender that it is compared with; None for a baseline.
        size: What the page calls the size of its model, such as "dense-0.25b"; empty where all have one size.
        ffn: Its label without the size.
        family: Its FFN at all sizes, as a number; see `sizes.families`.
    """

    label: str
    arms: tuple[int, ...]
    best: int | None
    chosen: bool
    baseline: int | None
    size: str
    ffn: str
    family: int


@dataclass(frozen=True)
class Contrast:
    """One arm against another in one loss, after the same number of images or tokens.

    Attributes:
        arm, reference: Positions in the list of arms.
        seen: Images or tokens seen where the two are compared; None if no validation is common to them.
        values, baseline: The loss by seed of the arm and of the reference, diverged runs left out.
        interval: The difference, arm minus reference.
    """

    arm: int
    reference: int
    seen: int | None
    values: dict[int, float]
    baseline: dict[int, float]
    interval: Interval

    @property
    def relative(self) -> float:
        """The mean difference as a fraction of the reference's mean."""
        return quotient(self.interval.mean, mean(self.baseline.values()))

    def adjusted(self, comparisons: int) -> Interval:
        """The same difference with an interval that, with those of all `comparisons`, holds at `CONFIDENCE`."""
        return difference(self.values, self.baseline, comparisons)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs, labels: By contender, rate and seed, and what the page calls them; the baseline's come first.
        arms: Runs that differ in seed only, together; by contender and rate.
        contenders: Arms that differ in peak rate only, together; the baseline first.
        differing: `config_difference` of the runs.
        incomparable: Why the losses cannot be compared as they stand, one line per reason.
        metric: The loss of the verdict, a column of the validation rows: the baseline's training objective.
    """

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    arms: tuple[Arm, ...]
    contenders: tuple[Contender, ...]
    differing: dict[str, list[Any]]
    incomparable: tuple[str, ...]
    metric: str

    @property
    def kind(self) -> Kind:
        """What all of these runs train."""
        return self.runs[0].kind

    @property
    def alternatives(self) -> list[int]:
        """Positions of the contenders that are compared with another one."""
        return [index for index, contender in enumerate(self.contenders) if contender.baseline is not None]

    def baseline_of(self, contender: int) -> Contender:
        """What a contender is compared with: itself, if it is a baseline."""
        baseline = self.contenders[contender].baseline
        return self.contenders[contender if baseline is None else baseline]

    @property
    def shown(self) -> tuple[int, ...]:
        """The runs that figures show at first: all if they are few, else those of the best arms."""
        best = [contender.best for contender in self.contenders if contender.best is not None]
        if len(self.runs) <= SHOWN_RUNS or not best:
            return tuple(range(len(self.runs)))
        return tuple(run for arm in best for run in self.arms[arm].runs)

    def arm_of(self, run: int) -> int:
        """The position of the arm that a run belongs to."""
        return next(index for index, arm in enumerate(self.arms) if run in arm.runs)

    def contender_of(self, run: int) -> int:
        """The position of the contender that a run belongs to."""
        arm = self.arm_of(run)
        return next(index for index, contender in enumerate(self.contenders) if arm in contender.arms)

    def best_run(self, contender: int) -> int:
        """The run that shows what a contender does: the best arm's first that did not diverge, else its first."""
        own = self.contenders[contender]
        runs = self.arms[own.arms[0] if own.best is None else own.best].runs
        return next((run for run in runs if self.runs[run].diverged_at is None), runs[0])

    def of_best_runs(self, records: Mapping[int, T]) -> dict[int, T]:
        """Of what runs recorded, by their position: the records of the runs that show what a contender does."""
        runs = [self.best_run(contender) for contender in range(len(self.contenders))]
        return {run: records[run] for run in runs if run in records}

    def complete(self, runs: Sequence[int]) -> list[Run]:
        """Of some runs those that came to the end of their contender's training with losses that are all finite."""
        return [self.runs[run] for run in runs if _usable(self.runs[run]) and not self.falls_short(run)]

    def falls_short(self, run: int) -> bool:
        """Whether a run that did not diverge is not as far as its contender's furthest: its loss is no final one."""
        own = self.runs[run]
        contender = self.contenders[self.contender_of(run)]
        rivals = [self.runs[other] for arm in contender.arms for other in self.arms[arm].runs]
        furthest = max((rival.validation[rival.counter][-1] for rival in rivals if _usable(rival)), default=0)
        return own.diverged_at is None and not (_usable(own) and own.validation[own.counter][-1] == furthest)

    def contrasts(self, loss: str) -> list[Contrast]:
        """The best arm of every other contender against its baseline's, in one loss, where they have one."""
        pairs = [(self.contenders[own].best, self.baseline_of(own).best) for own in self.alternatives]
        return [
            self.contrast(arm, reference, loss) for arm, reference in pairs if arm is not None and reference is not None
        ]

    def equal_rates(self, loss: str) -> list[Contrast]:
        """Every arm of the other contenders against their baseline's of the same peak rate, where there is one."""
        pairs = [
            (arm, other)
            for own in self.alternatives
            for arm in self.contenders[own].arms
            for other in self.baseline_of(own).arms
            if self.arms[arm].rate == self.arms[other].rate
        ]
        return [self.contrast(arm, other, loss) for arm, other in pairs]

    def contrast(self, arm: int, reference: int, loss: str) -> Contrast:
        """One arm against another in one loss, at the last validation they share.

        Seeds that are unfinished where others of their arm have come to the end are left out.
        """
        usable = [[run for run in self.arms[side].runs if _usable(self.runs[run])] for side in (arm, reference)]
        complete = [[run for run in side if not self.falls_short(run)] or side for side in usable]
        sides = [[self.runs[run] for run in side] for side in complete]
        seen = [set(run.validation[run.counter]) for side in sides for run in side]
        common = set.intersection(*seen) if all(sides) else set()
        if not common:
            return Contrast(arm, reference, None, {}, {}, Interval(math.nan, math.nan, math.nan, False))
        at = max(common)
        values, baseline = (by_seed(side, [_at(run, loss, at) for run in side]) for side in sides)
        return Contrast(arm, reference, int(at), values, baseline, difference(values, baseline))


def compare(runs: Sequence[Run], *, strict: bool = False, baseline: str | Sequence[str] | None = None) -> Comparison:
    """Put runs side by side; the first belongs to the baseline, unless `baseline` names another.

    Args:
        runs: In any order.
        strict: Refuse what would otherwise be a warning.
        baseline: A contender's label ("SwiGLU"), an FFN ("swiglu"), or a run's name or folder; of several the first
            that is there.

    Raises:
        NotComparableError: A folder is given twice, some train language models and some autoencoders, or nothing is
            called `baseline`; or `strict`, and the runs differ in data, masks, batch, budget or image size.
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    _check_alike(runs)
    runs = _ordered(runs, [baseline] if isinstance(baseline, str) else baseline or [])
    metric = _metric(runs[0])
    arms, contenders = _contenders(runs, metric)
    labels = _labels(runs, arms)
    differing = config_difference([run.config for run in runs])
    incomparable = (
        *_unequal_keys(runs, labels, arms, contenders),
        *_unequal_budget(runs, labels, arms, contenders),
        *_unequal_tiles(runs, labels),
    )
    if strict and incomparable:
        raise NotComparableError(f"not comparable: {'; '.join(incomparable)}; without --strict this is a warning")
    return Comparison(tuple(runs), labels, arms, contenders, differing, incomparable, metric)


def _check_alike(runs: Sequence[Run]) -> None:
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise NotComparableError(f"{folder}: given {folders.count(folder)} times; give every run once")
    for run in runs:
        if run.kind != runs[0].kind:
            raise NotComparableError(
                f"{runs[0].folder} is a {runs[0].kind.name} and {run.folder} a {run.kind.name}; "
                "give each its own --section"
            )


def _metric(run: Run) -> str:
    if len(run.losses) == 1:
        return next(iter(run.losses))
    return "loss_norm" if flatten(run.config).get("model.norm_pix_loss", True) else "loss_pixel"


def _usable(run: Run) -> bool:
    return run.diverged_at is None and len(run.validation["step"]) > 0


def _at(run: Run, loss: str, seen: float) -> float:
    return float(run.validation[loss][run.validation[run.counter] == seen][-1])


def _groups(runs: Sequence[Run], *leave_out: str) -> list[tuple[int, ...]]:
    """Positions of runs that are equal in all keys but those of some roles, together, in the order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        method = {key: value for key, value in flatten(run.config).items() if role(key, [value]) not in leave_out}
        groups.setdefault(canonical(method), []).append(index)
    return [tuple(group) for group in groups.values()]


def _ordered(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """The baseline's runs first; size by size where there are several; each contender's by rate, then seed."""
    groups = _groups(runs, *_AMONG_CONTENDER)
    if names:
        first = _find(runs, groups, names)
        groups = [groups[first], *groups[:first], *groups[first + 1 :]]
    against = baselines([runs[group[0]].config for group in groups])
    beside = [index if own is None else own for index, own in enumerate(against)]
    order = sorted(range(len(groups)), key=lambda index: (beside[index], against[index] is not None))
    groups = [groups[index] for index in order]
    return [
        runs[index]
        for group in groups
        for index in sorted(group, key=lambda index: (runs[index].peak_lr, runs[index].seed))
    ]


def _find(runs: Sequence[Run], groups: Sequence[tuple[int, ...]], names: Sequence[str]) -> int:
    """The contender that the first fitting name means: its label, its FFN, or a run's name or folder."""
    labels = [_contender_names(runs, group, groups)[0] for group in groups]
    named = [{text for run in group for text in _names(runs[run])} for group in groups]
    numbers = sizes([runs[group[0]].config for group in groups])
    found: list[int] = []
    for name in names:
        if name in labels:
            return labels.index(name)
        found = [index for index, own in enumerate(named) if name in own]
        if found and len({numbers[index] for index in found}) == len(found):  # one a size: the baseline of them all
            return found[0]
    name, what = " or ".join(names), "belongs to several" if found else "is none"
    raise NotComparableError(f"--baseline {name} {what} of the contenders; give one of: {'; '.join(labels)}")


def _names(run: Run) -> tuple[str, ...]:
    """By what a run can be asked for; the FFN's name does not mean its widened form."""
    widened = flatten(run.config).get("model.size") in WIDENED
    return (run.name, str(run.folder), *(() if widened else (run.ffn,)))


def _contenders(runs: Sequence[Run], metric: str) -> tuple[tuple[Arm, ...], tuple[Contender, ...]]:
    groups = _groups(runs, *_AMONG_CONTENDER)
    configs = [runs[group[0]].config for group in groups]
    arms: list[Arm] = []
    contenders = []
    for group, baseline, family in zip(groups, baselines(configs), families(configs), strict=True):
        label, ffn, size = _contender_names(runs, group, groups)
        rates = sorted({runs[run].peak_lr for run in group})
        first = len(arms)
        for rate in rates:
            own = tuple(run for run in group if runs[run].peak_lr == rate)
            arms.append(Arm(f"{label}, lr {formatting.rate(rate)}" if len(rates) > 1 else label, own, rate))
        best = _best([[runs[run] for run in arm.runs] for arm in arms[first:]], metric)
        own_arms = tuple(range(first, len(arms)))
        best = None if best is None else own_arms[best]
        contenders.append(Contender(label, own_arms, best, len(rates) > 1, baseline, size, ffn, family))
    return tuple(arms), tuple(contenders)


def _best(arms: Sequence[Sequence[Run]], metric: str) -> int | None:
    if len(arms) == 1:
        return 0 if any(map(_usable, arms[0])) else None
    ends = [run.validation[run.counter][-1] for arm in arms for run in arm if _usable(run)]
    finished = [[run for run in arm if _usable(run) and run.validation[run.counter][-1] == max(ends)] for arm in arms]
    complete = {
        index: mean(by_seed(own, [_at(run, metric, max(ends)) for run in own]).values())
        for index, (arm, own) in enumerate(zip(arms, finished, strict=True))
        if own and all(run.diverged_at is None for run in arm)
    }
    return min(complete, key=lambda index: complete[index], default=None)


def _compared(runs: Sequence[Run], arms: Sequence[Arm], contender: Contender) -> list[int]:
    """The furthest runs of a contender's best arm; of all its arms if it has none."""
    own = contender.arms if contender.best is None else (contender.best,)
    members = [run for arm in own for run in arms[arm].runs]
    furthest = max(runs[run].seen for run in members)
    return [run for run in members if runs[run].seen == furthest or runs[run].status == "finished"]


def _sets(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Every baseline with what is compared with it."""
    return [
        [own for index, own in enumerate(contenders) if at in (index, own.baseline)]
        for at, baseline in enumerate(contenders)
        if baseline.baseline is None
    ]


def _contender_names(
    runs: Sequence[Run], group: tuple[int, ...], groups: Sequence[tuple[int, ...]]
) -> tuple[str, str, str]:
    """A contender's label, the same without the size, and the size, which is empty where all have the same.

    The label is the FFN, the size, and what sets it apart from others with the same FFN and size.
    """
    run, configs = runs[group[0]], [runs[other[0]].config for other in groups]
    own, size = flatten(run.config), size_part(run.config)
    rivals = [
        runs[other[0]].config
        for other in groups
        if runs[other[0]].ffn == run.ffn and size_part(runs[other[0]].config) == size
    ]
    apart = [
        key
        for key, values in config_difference(rivals).items()
        if role(key, values) not in _AMONG_CONTENDER and key in own and key not in BUDGETS  # tokens seen are compared
    ]
    settings = [run.name] if len(apart) > 3 else [_setting_label(key, own[key]) for key in apart]
    name, of_size = FFN_NAMES.get(run.ffn, run.ffn), _size_label(run, configs)
    sized = [of_size] if of_size and not any(key == "model.size" for key in apart) else []
    return ", ".join([name, *sized, *settings]), ", ".join([name, *settings]), of_size


def _setting_label(key: str, value: Any) -> str:
    name = key.split(".")[-1].removeprefix("ffn_")
    return show(value) if name in ("size", "encoder") else f"{name} {show(value)}"


def _size_label(run: Run, configs: Sequence[Mapping[str, Any]]) -> str:
    """The values by which a run's size differs from others, or a number if these are many; empty if none differ."""
    size, keys = size_part(run.config), size_keys(configs)
    if len(keys) <= 3:
        return ", ".join(_setting_label(key, size[key]) for key in keys if key in size)
    return f"size {sizes(configs)[[size_part(config) for config in configs].index(size)] + 1}"


def _labels(runs: Sequence[Run], arms: Sequence[Arm]) -> tuple[str, ...]:
    by_run = {run: arm for arm in arms for run in arm.runs}
    labels = [
        by_run[index].label if len(by_run[index].runs) == 1 else f"{by_run[index].label}, seed {run.seed}"
        for index, run in enumerate(runs)
    ]
    for distinguish in (lambda run: run.name, lambda run: str(run.folder)):
        labels = [
            f"{label}, {distinguish(run)}" if labels.count(label) > 1 else label
            for label, run in zip(labels, runs, strict=True)
        ]
    return tuple(labels)


def _unequal_keys(
    runs: Sequence[Run], labels: Sequence[str], arms: Sequence[Arm], contenders: Sequence[Contender]
) -> list[str]:
    """Keys that must be the same: the schedule's for what is compared with one baseline, all others for all runs."""
    everything = _mismatches(runs, labels, range(len(runs)))
    reasons = [words for key, words in everything if not key.startswith("schedule.")]
    for members in _sets(contenders):
        own = [run for contender in members for arm in contender.arms for run in arms[arm].runs]
        reasons += [words for key, words in _mismatches(runs, labels, own) if key.startswith("schedule.")]
    return reasons


def _mismatches(runs: Sequence[Run], labels: Sequence[str], own: Sequence[int]) -> list[tuple[str, str]]:
    found = []
    for key, values in config_difference([runs[run].config for run in own]).items():
        # A budget may be given in tokens here and in tokens a parameter there: what was seen is compared as well.
        named = [value for value in values if value is not None] if key in BUDGETS else values
        if role(key, values) == "must match" and any(value != named[0] for value in named):
            found.append((key, f"{key}: {spell([labels[run] for run in own], [show(value) for value in values])}"))
    return found


def _unequal_budget(
    runs: Sequence[Run], labels: Sequence[str], arms: Sequence[Arm], contenders: Sequence[Contender]
) -> list[str]:
    """Of the runs that are compared: rates that were not picked, and further seeds, may be unfinished."""
    reasons = []
    for members in _sets(contenders):
        compared = [run for contender in members for run in _compared(runs, arms, contender)]
        seen = {labels[run]: runs[run].seen for run in compared if runs[run].diverged_at is None}
        if len(set(seen.values())) > 1:
            counts = spell([*seen], [formatting.grouped(value) for value in seen.values()])
            reasons.append(f"{runs[0].unit}s seen: {counts}")
    return reasons


def _unequal_tiles(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """The recorded pictures themselves: whether the same key shows the same photograph under the same mask."""
    shown = [
        (label, {image.key: image for image in run.reconstructions}) for label, run in zip(labels, runs, strict=True)
    ]
    shown = [(label, images) for label, images in shown if images]
    faults = []
    for label, images in shown[1:]:
        first_label, first = shown[0]
        for tile, what in (("original", "pixels"), ("masked", "mask")):
            unequal = [
                key
                for key in first
                if key in images and not _same(getattr(first[key], tile), getattr(images[key], tile))
            ]
            if unequal:
                which = f"{what} of {len(unequal)} held-out images, such as {unequal[0]}"
                faults.append(f"{which}: {label} differs from {first_label}")
                break  # other pixels make another masked picture: one reason is enough
    return faults


def _same(a: Path, b: Path) -> bool:
    with Image.open(a) as first, Image.open(b) as second:
        return first.size == second.size and np.array_equal(
            np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB"))
        )
