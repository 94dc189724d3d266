"""What a set of runs says: who competes, at which rate, by how much they differ, and how sure that is.

    run          one run folder
    arm          runs that differ in their seed only
    contender    arms that differ in their peak rate only: usually one FFN. Its best arm, by which it is compared, is
                 the one with the lowest mean final validation loss

The first run's contender is the baseline. All losses are losses on held-out data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moa_eval.page import formatting
from moa_eval.page.formatting import show, spell
from moa_eval.training.configuration import canonical, config_difference, flatten, role
from moa_eval.training.runs import Kind, Run
from moa_eval.training.seeds import Interval, by_seed, difference, mean, quotient

_AMONG_CONTENDER = ("identity", "bookkeeping", "peak rate")  # in what runs of one contender may differ
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
    """

    label: str
    arms: tuple[int, ...]
    best: int | None
    chosen: bool


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
    def reference(self) -> int | None:
        """The baseline's best arm, which the others are compared with; None if the baseline has none."""
        return self.contenders[0].best

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

    def falls_short(self, run: int) -> bool:
        """Whether a run that did not diverge is not as far as its contender's furthest: its loss is no final one."""
        own = self.runs[run]
        contender = self.contenders[self.contender_of(run)]
        rivals = [self.runs[other] for arm in contender.arms for other in self.arms[arm].runs]
        furthest = max((rival.validation[rival.counter][-1] for rival in rivals if _usable(rival)), default=0)
        return own.diverged_at is None and not (_usable(own) and own.validation[own.counter][-1] == furthest)

    def keys(self, *roles: str) -> list[str]:
        """The differing keys of some roles."""
        return [key for key, values in self.differing.items() if role(key, values) in roles]

    def contrasts(self, loss: str) -> list[Contrast]:
        """The best arm of every other contender against the baseline's, in one loss, where they have one."""
        best = [contender.best for contender in self.contenders[1:]]
        return [
            self.contrast(arm, self.reference, loss) for arm in best if arm is not None and self.reference is not None
        ]

    def equal_rates(self, loss: str) -> list[Contrast]:
        """Every arm of the other contenders against the baseline's arm of the same peak rate, where there is one."""
        baseline = {self.arms[arm].rate: arm for arm in self.contenders[0].arms}
        return [
            self.contrast(arm, baseline[self.arms[arm].rate], loss)
            for contender in self.contenders[1:]
            for arm in contender.arms
            if self.arms[arm].rate in baseline
        ]

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


def compare(runs: Sequence[Run], *, strict: bool = False, baseline: str | None = None) -> Comparison:
    """Put runs side by side; the first belongs to the baseline, unless `baseline` names another.

    Args:
        runs: In any order.
        strict: Refuse what would otherwise be a warning.
        baseline: A contender's label ("SwiGLU"), an FFN ("swiglu"), or a run's name or folder.

    Raises:
        NotComparableError: A folder is given twice, some train language models and some autoencoders, or nothing is
            called `baseline`; or `strict`, and the runs differ in data, masks, batch, budget or image size.
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    _check_alike(runs)
    runs = _ordered(runs, baseline)
    metric = _metric(runs[0])
    arms, contenders = _contenders(runs, metric)
    labels = _labels(runs, arms)
    differing = config_difference([run.config for run in runs])
    incomparable = (
        *_unequal_keys(differing, labels),
        *_unequal_budget(runs, labels, _compared(runs, arms, contenders)),
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


def _ordered(runs: Sequence[Run], baseline: str | None) -> list[Run]:
    """The baseline's runs first; each contender's by rate, then seed, then as given."""
    groups = _groups(runs, *_AMONG_CONTENDER)
    if baseline is not None:
        first = _find(runs, groups, baseline)
        groups = [groups[first], *groups[:first], *groups[first + 1 :]]
    return [
        runs[index]
        for group in groups
        for index in sorted(group, key=lambda index: (runs[index].peak_lr, runs[index].seed))
    ]


def _find(runs: Sequence[Run], groups: Sequence[tuple[int, ...]], name: str) -> int:
    """The contender that a name means, by its label, its FFN, or the name or folder of a run."""
    labels = [_contender_label(runs, group, groups) for group in groups]
    if name in labels:
        return labels.index(name)
    named = [
        {text for run in group for text in (runs[run].ffn, runs[run].name, str(runs[run].folder))} for group in groups
    ]
    found = [index for index, names in enumerate(named) if name in names]
    if len(found) == 1:
        return found[0]
    what = "belongs to several" if found else "is none"
    raise NotComparableError(f"--baseline {name} {what} of the contenders; give one of: {'; '.join(labels)}")


def _contenders(runs: Sequence[Run], metric: str) -> tuple[tuple[Arm, ...], tuple[Contender, ...]]:
    groups = _groups(runs, *_AMONG_CONTENDER)
    arms: list[Arm] = []
    contenders = []
    for group in groups:
        label = _contender_label(runs, group, groups)
        rates = sorted({runs[run].peak_lr for run in group})
        first = len(arms)
        for rate in rates:
            own = tuple(run for run in group if runs[run].peak_lr == rate)
            arms.append(Arm(f"{label}, lr {formatting.rate(rate)}" if len(rates) > 1 else label, own, rate))
        best = _best([[runs[run] for run in arm.runs] for arm in arms[first:]], metric)
        own_arms = tuple(range(first, len(arms)))
        contenders.append(Contender(label, own_arms, None if best is None else own_arms[best], len(rates) > 1))
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


def _compared(runs: Sequence[Run], arms: Sequence[Arm], contenders: Sequence[Contender]) -> list[int]:
    """The furthest runs of every contender's best arm; of all its arms if it has none."""
    compared = []
    for own in contenders:
        members = [run for arm in (own.arms if own.best is None else (own.best,)) for run in arms[arm].runs]
        furthest = max(runs[run].seen for run in members)
        compared += [run for run in members if runs[run].seen == furthest or runs[run].status == "finished"]
    return compared


def _contender_label(runs: Sequence[Run], group: tuple[int, ...], groups: Sequence[tuple[int, ...]]) -> str:
    """The FFN, and what sets it apart from other contenders with the same FFN."""
    run = runs[group[0]]
    label = FFN_NAMES.get(run.ffn, run.ffn)
    rivals = [runs[other[0]].config for other in groups if runs[other[0]].ffn == run.ffn]
    own = flatten(run.config)
    apart = [
        key
        for key, values in config_difference(rivals).items()
        if role(key, values) not in _AMONG_CONTENDER and key in own
    ]
    if len(apart) > 3:
        return f"{label}, {run.name}"
    return ", ".join([label, *(f"{key.split('.')[-1].removeprefix('ffn_')} {show(own[key])}" for key in apart)])


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


def _unequal_keys(differing: Mapping[str, list[Any]], labels: Sequence[str]) -> list[str]:
    keys = [key for key, values in differing.items() if role(key, values) == "must match"]
    return [f"{key}: {spell(labels, [show(value) for value in differing[key]])}" for key in keys]


def _unequal_budget(runs: Sequence[Run], labels: Sequence[str], compared: Sequence[int]) -> list[str]:
    """Of the runs that are compared: rates that were not picked, and further seeds, may be unfinished."""
    seen = {labels[run]: runs[run].seen for run in compared if runs[run].diverged_at is None}
    if len(set(seen.values())) < 2:
        return []
    return [f"{runs[0].unit}s seen: {spell([*seen], [formatting.grouped(value) for value in seen.values()])}"]


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
