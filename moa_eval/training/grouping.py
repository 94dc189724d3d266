"""Runs -> methods with their baselines and names: which runs belong together, and which methods are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from moa_eval.page.formatting import grouped, rate, show, spell
from moa_eval.training.comparison import Comparison, Method, RunGroup, best_group
from moa_eval.training.configuration import (
    ABSENT,
    BUDGETS,
    WIDENED,
    WITHIN_METHOD,
    Config,
    canonical,
    config_difference,
    ffn_part,
    method_key,
    role,
    size_part,
)
from moa_eval.training.runs import Run
from moa_train.errors import ConfigError, DataError

FFN_NAMES = {
    "relu2": "ReLU²", "gelu": "GELU", "la": "LA", "moa": "MoA", "swiglu": "SwiGLU", "onela": "one-LA",
    "bila": "bi-LA", "qdla": "qd-LA", "onemoa": "one-MoA", "bimoa": "bi-MoA", "qdmoa": "qd-MoA",
    "geglu": "GEGLU", "reglu": "ReGLU", "relu2glu": "ReLU²-GLU", "bilinear": "bilinear GLU",
    "swish": "trainable Swish", "xielu": "xIELU", "polynorm": "PolyNorm", "pau": "PAU",
}  # fmt: skip
_MOST_SETTINGS = 3  # shown in a label; beyond that, the run's name or the number of the size stands for them


@dataclass(eq=False)
class Draft:
    """A method before it has a name: its runs by learning rate and seed."""

    runs: list[Run]
    family: str = ""
    baseline: Draft | None = None

    @cached_property
    def size(self) -> str:
        """Key that is equal for methods of one model size."""
        return canonical(size_part(self.config))

    @property
    def config(self) -> Config:
        """The config of the first run."""
        return self.runs[0].config


def compare(runs: Sequence[Run], *, strict: bool = False, baseline: str | Sequence[str] = ()) -> Comparison:
    """Compare runs; the first belongs to the baseline, unless `baseline` names another.

    A baseline is named by a method's label ("SwiGLU"), an FFN ("swiglu"), or a run's name or folder; of several names
    the first that exists is taken.

    Raises:
        DataError: A folder is given twice, or the runs are of different kinds; with `strict`, the runs differ in
            data, masks, batch, budget or image size.
        ConfigError: No method matches `baseline`.
    """
    _check_alike(runs)
    drafts = _drafts(runs)
    if names := [baseline] if isinstance(baseline, str) else baseline:
        first = _find(drafts, names)
        drafts = [first, *(draft for draft in drafts if draft is not first)]
    assign_families(drafts)
    assign_baselines(drafts)
    baselines = [draft for draft in drafts if draft.baseline is None]
    drafts = [own for first in baselines for own in (first, *(draft for draft in drafts if draft.baseline is first))]
    metric = _metric(drafts[0].runs[0])
    methods = _methods(drafts, metric)
    incomparable = tuple(_incomparable_reasons(methods))
    if strict and incomparable:
        raise DataError(f"not comparable: {'; '.join(incomparable)}; omit --strict for a report with a warning")
    return Comparison(methods, metric, incomparable)


def assign_families(drafts: Sequence[Draft]) -> None:
    """Set the family of every draft: its FFN, and how it differs from others with the same FFN and size.

    Of several methods with one FFN and one size, such as a baseline and its widened form, the one closest to the
    first draft is the FFN's. Each of the others makes a family with those that differ in the same way.
    """
    rivals: dict[tuple[str, str], list[Draft]] = {}
    for draft in drafts:
        rivals.setdefault((draft.size, canonical(ffn_part(draft.config))), []).append(draft)
    for (_, ffn), group in rivals.items():
        plain = min(group, key=lambda draft: len(_setting_difference(drafts[0], draft)))
        for draft in group:
            draft.family = ffn + canonical(_setting_difference(plain, draft))


def assign_baselines(drafts: Sequence[Draft]) -> None:
    """Set the baseline of every draft: the first draft's family at the same size, else the first draft.

    The first draft's family is the baseline at a further size if another family was trained at that size. Otherwise a
    further size of that family is an alternative to the first draft.
    """
    first = drafts[0]
    at_size = {draft.size: draft for draft in reversed(drafts) if draft.family == first.family}
    per_size = any(draft.family != first.family and draft.size in {*at_size} - {first.size} for draft in drafts)
    for draft in drafts:
        if draft.family != first.family:
            draft.baseline = at_size.get(draft.size, first)
        elif draft is not first and not per_size:
            draft.baseline = first


def _check_alike(runs: Sequence[Run]) -> None:
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise DataError(f"{folder}: given {folders.count(folder)} times; give every run once")
    first = runs[0]
    for run in runs:
        if run.kind != first.kind:
            raise DataError(
                f"{first.folder} is a {first.kind.name} and {run.folder} a {run.kind.name}; "
                "use a --section for each kind"
            )


def _drafts(runs: Sequence[Run]) -> list[Draft]:
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(method_key(run.config), []).append(run)
    return [Draft(sorted(own, key=lambda run: (run.peak_lr, run.seed))) for own in by_method.values()]


def _find(drafts: Sequence[Draft], names: Sequence[str]) -> Draft:
    firsts = [draft.runs[0] for draft in drafts]
    labels = [_method_names(run, firsts).label for run in firsts]
    for name in names:
        if name in labels:
            return drafts[labels.index(name)]
        found = [draft for draft in drafts if any(name in _aliases(run) for run in draft.runs)]
        if found and len({draft.size for draft in found}) == len(found):  # one per size: the baseline of all sizes
            return found[0]
    raise ConfigError(f"--baseline {' or '.join(names)} matches no single method; give one of: {'; '.join(labels)}")


def _aliases(run: Run) -> tuple[str, ...]:
    """Return the names of a run for `--baseline`; the FFN's name does not stand for its widened form."""
    widened = run.settings.get("model.size") in WIDENED
    return (run.name, str(run.folder)) if widened else (run.name, str(run.folder), run.ffn)


def _metric(run: Run) -> str:
    losses = [*run.kind.losses]
    return losses[0] if run.settings.get("model.norm_pix_loss", True) else losses[-1]


def _methods(drafts: Sequence[Draft], metric: str) -> tuple[Method, ...]:
    """Name the drafts and their runs; a baseline comes before its alternatives."""
    firsts = [draft.runs[0] for draft in drafts]
    names = {draft: _method_names(run, firsts) for draft, run in zip(drafts, firsts, strict=True)}
    by_rate = {draft: _by_rate(draft, names[draft].label) for draft in drafts}
    labels = _run_labels([group for groups in by_rate.values() for group in groups])
    position = itertools.count()
    methods: dict[Draft, Method] = {}
    for draft in drafts:
        end = max((run.end for run in draft.runs if run.is_usable), default=0.0)
        groups = []
        for label, runs in by_rate[draft]:
            named = [replace(run, index=(at := next(position)), label=labels[at]) for run in runs]
            groups.append(RunGroup(label, tuple(named), end))
        methods[draft] = Method(
            *names[draft],
            family=draft.family,
            groups=tuple(groups),
            best=best_group(groups, metric),
            baseline=methods[draft.baseline] if draft.baseline else None,
            index=len(methods),
        )
    return tuple(methods.values())


def _by_rate(draft: Draft, label: str) -> list[tuple[str, list[Run]]]:
    """Return the run groups of a method as labels and runs, by rising learning rate; several rates are in the label."""
    rates = sorted({run.peak_lr for run in draft.runs})
    labels = [f"{label}, lr {rate(peak)}" if len(rates) > 1 else label for peak in rates]
    return [(own, [run for run in draft.runs if run.peak_lr == peak]) for own, peak in zip(labels, rates, strict=True)]


def _setting_difference(a: Draft, b: Draft) -> dict[str, Any]:
    """Return the settings in which two methods of one size differ, with the value of the second."""
    differing = config_difference([a.config, b.config])
    ignored = (*WITHIN_METHOD, "size")
    return {key: values[1] for key, values in differing.items() if role(key, values) not in ignored}


def _incomparable_reasons(methods: Sequence[Method]) -> list[str]:
    """Return the reasons why the losses of these methods are not comparable, one line each.

    The schedule must match among the methods with one baseline, everything else among all runs.
    """
    sets = [[method for method in methods if method.reference is first] for first in methods if not first.baseline]
    runs = [run for method in methods for run in method.runs]
    reasons = [words for key, words in _key_mismatches(runs) if not key.startswith("schedule.")]
    for own in sets:
        members = [run for method in own for run in method.runs]
        reasons += [words for key, words in _key_mismatches(members) if key.startswith("schedule.")]
    return [*reasons, *(reason for own in sets for reason in _budget_mismatch(own))]


def _key_mismatches(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    for key, values in config_difference([run.config for run in runs]).items():
        # A budget may be given in different units; what the runs have seen is compared as well.
        given = [value for value in values if value is not None] if key in BUDGETS else values
        if role(key, values) == "must match" and any(value != given[0] for value in given):
            yield key, f"{key}: {spell([run.label for run in runs], [show(value) for value in values])}"


def _budget_mismatch(methods: Sequence[Method]) -> Iterator[str]:
    """Compare what the best groups have seen; runs at other rates and further seeds may be unfinished."""
    compared = []
    for method in methods:
        furthest = max(run.seen for run in method.best_runs)
        compared += [run for run in method.best_runs if run.seen == furthest or run.status == "finished"]
    seen = {run.label: run.seen for run in compared if run.diverged_at is None}
    if len(set(seen.values())) > 1:
        yield f"{compared[0].kind.unit}s seen: {spell([*seen], [grouped(value) for value in seen.values()])}"


class _MethodNames(NamedTuple):
    """A method's label, the label without the size, and the size (empty if all methods have the same size)."""

    label: str
    name: str
    size: str


def _method_names(run: Run, firsts: Sequence[Run]) -> _MethodNames:
    """Return the names of the method of a run: its FFN, its size, and the settings that distinguish it.

    `firsts` are the first runs of all methods.
    """
    size_values = size_part(run.config)
    rivals = [other.config for other in firsts if other.ffn == run.ffn and size_part(other.config) == size_values]
    keys = [
        key
        for key, values in config_difference(rivals).items()
        if role(key, values) not in WITHIN_METHOD and key in run.settings and key not in BUDGETS
    ]
    settings = [_setting(key, run.settings[key]) for key in keys] if len(keys) <= _MOST_SETTINGS else [run.name]
    ffn, size = FFN_NAMES.get(run.ffn, run.ffn), _size(run, firsts)
    sized = [size] if size and "model.size" not in keys else []
    return _MethodNames(", ".join([ffn, *sized, *settings]), ", ".join([ffn, *settings]), size)


def _run_labels(groups: Sequence[tuple[str, Sequence[Run]]]) -> list[str]:
    """Return a unique label per run: its group's label, the seed, and if need be its name or folder."""
    runs = [run for _, own in groups for run in own]
    labels = [label if len(own) == 1 else f"{label}, seed {run.seed}" for label, own in groups for run in own]
    for suffixes in ([run.name for run in runs], [str(run.folder) for run in runs]):
        pairs = zip(labels, suffixes, strict=True)
        labels = [f"{label}, {suffix}" if labels.count(label) > 1 else label for label, suffix in pairs]
    return labels


def _setting(key: str, value: Any) -> str:
    name = key.split(".")[-1].removeprefix("ffn_")
    return show(value) if name in ("size", "encoder") else f"{name} {show(value)}"


def _size(run: Run, firsts: Sequence[Run]) -> str:
    parts = [size_part(other.config) for other in firsts]
    own = size_part(run.config)
    keys = [
        key
        for key in dict.fromkeys(key for part in parts for key in part)
        if len({canonical(part.get(key, ABSENT)) for part in parts}) > 1
    ]
    if len(keys) <= _MOST_SETTINGS:
        return ", ".join(_setting(key, own[key]) for key in keys if key in own)
    return f"size {[*dict.fromkeys(map(canonical, parts))].index(canonical(own)) + 1}"
