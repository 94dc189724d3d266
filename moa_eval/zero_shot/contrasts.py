"""Harness results side by side: refuses what cannot be compared, and tests every difference over the same items.

The first evaluation is the baseline. Scores and differences are fractions; "average" is the mean over the tasks of
`ZERO_SHOT` that are present, other tasks stand beside it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moa_eval.zero_shot import paired
from moa_eval.zero_shot.output import Evaluation, Metric, TaskResult
from moa_train.errors import DataError as NotComparableError

AVERAGE = "average"
HEADLINE = "headline"  # the average of each task's own headline metric
_SHOWN_REASONS = 4  # of a refusal; the rest is counted


class Task(NamedTuple):
    """How the paper's table calls a task, and the metric that stands for it."""

    label: str
    headline: str


# acc_norm divides a choice's log-likelihood by its length in characters: usual where choices are sentences of unequal
# length. WinoGrande scores one and the same suffix after both options; the harness gives no acc_norm for it.
ZERO_SHOT = {
    "arc_challenge": Task("ARC-C", "acc_norm"),
    "hellaswag": Task("HellaSwag", "acc_norm"),
    "openbookqa": Task("OpenBookQA", "acc_norm"),
    "winogrande": Task("WinoGrande", "acc"),
}


class Score(NamedTuple):
    """A value with its standard error over items."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Contrast:
    """One model against the baseline in one metric of one task, or of the average.

    Attributes:
        task: The task's name or `AVERAGE`.
        metric: The metric's name; for the average "headline" or "acc".
        headline: Whether this is the task's headline metric: only these are tested together (`p_holm`).
        model: Position of the model in the list of evaluations.
        items: Number of items both answered.
        score, baseline: Both values.
        table: Both models' right and wrong answers; None for scores other than 0 and 1. The average's is the sum.
        difference: score - baseline.
        interval: Its paired bootstrap interval at 95 %.
        stderr: Its paired standard error.
        p_value: Exact McNemar test, for the average stratified by task; NaN for scores other than 0 and 1.
        p_holm: The same, adjusted for all headline tests of tasks, or of averages; NaN where not adjusted.
    """

    task: str
    metric: str
    headline: bool
    model: int
    items: int
    score: float
    baseline: float
    table: paired.Table | None
    difference: float
    interval: paired.Interval
    stderr: float
    p_value: float
    p_holm: float = math.nan

    @property
    def detectable(self) -> float:
        """The smallest difference that would be seen in four of five such evaluations."""
        return paired.detectable(self.stderr)

    @property
    def discordant(self) -> int | None:
        """Number of items that exactly one of the two got right."""
        return None if self.table is None else self.table.first + self.table.second


@dataclass(frozen=True)
class ZeroShot:
    """Evaluations of the same items side by side.

    Attributes:
        evaluations, labels: As given, and what the page calls them; the first is the baseline.
        tasks: Names in the order of the table: those of `ZERO_SHOT` first.
        contrasts: Every other model against the baseline in everything that can be compared.
    """

    evaluations: tuple[Evaluation, ...]
    labels: tuple[str, ...]
    tasks: tuple[str, ...]
    contrasts: tuple[Contrast, ...]

    @property
    def averaged(self) -> tuple[str, ...]:
        """The tasks that the average is over."""
        return tuple(task for task in self.tasks if task in ZERO_SHOT)

    @property
    def items(self) -> int:
        """Number of items of the averaged tasks."""
        return sum(len(self.evaluations[0].tasks[task].items) for task in self.averaged)

    def headline(self, task: str) -> str:
        """The name of the metric that stands for a task."""
        return headline(self.evaluations[0].tasks[task])

    def metrics(self, task: str) -> list[str]:
        """The names of a task's metrics, the headline first."""
        first = self.headline(task)
        return [first, *(name for name in self.evaluations[0].tasks[task].metrics if name != first)]

    def score(self, task: str, metric: str, model: int) -> Score:
        """A model's value in a task's metric as the harness has it, or in the average ("headline" or "acc")."""
        tasks = self.evaluations[model].tasks
        if task != AVERAGE:
            return Score(tasks[task].metrics[metric].value, tasks[task].metrics[metric].stderr)
        parts = [tasks[name].metrics[self.headline(name) if metric == HEADLINE else metric] for name in self.averaged]
        error = math.sqrt(math.fsum(_error(part) ** 2 for part in parts)) / len(parts)
        return Score(math.fsum(part.value for part in parts) / len(parts), error)

    def is_fraction(self, task: str, metric: str) -> bool:
        """Whether a metric is the mean of scores in [0, 1], and so can be given in percent."""
        if task == AVERAGE:
            return all(self.is_fraction(name, self.headline(name)) for name in self.averaged)
        columns = [evaluation.tasks[task].metrics[metric].scores for evaluation in self.evaluations]
        return all(scores is not None and scores.min() >= 0 and scores.max() <= 1 for scores in columns)

    def averages(self) -> list[str]:
        """The metrics that an average exists for: none for fewer than two tasks; "acc" where it is another one."""
        if len(self.averaged) < 2:
            return []
        tasks = self.evaluations[0].tasks
        shared = all("acc" in tasks[name].metrics for name in self.averaged)
        another = any(self.headline(name) != "acc" for name in self.averaged)
        return [HEADLINE, *(["acc"] if shared and another else [])]

    def find(self, task: str, metric: str, model: int) -> Contrast | None:
        """A contrast by what it is of."""
        wanted = (task, metric, model)
        return next((c for c in self.contrasts if (c.task, c.metric, c.model) == wanted), None)


def headline(task: TaskResult) -> str:
    """The metric that stands for a task: `ZERO_SHOT`'s, else acc_norm, acc or the first that has a value per item."""
    wished = ZERO_SHOT[task.name].headline if task.name in ZERO_SHOT else "acc_norm"
    per_item = [name for name, metric in task.metrics.items() if metric.scores is not None]
    return next(name for name in (wished, "acc", *per_item, *task.metrics) if name in task.metrics)


def label_of(task: str) -> str:
    """What the table calls a task."""
    return "Average" if task == AVERAGE else ZERO_SHOT[task].label if task in ZERO_SHOT else task


def compare_evaluations(evaluations: Sequence[Evaluation], baseline: str | None = None) -> ZeroShot:
    """Put evaluations side by side; `baseline` names one by its label, its model or its path (default: the first).

    Raises:
        ValueError: There is no evaluation.
        NotComparableError: They did not ask the same questions in the same way, or none is called `baseline`.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; give at least one")
    labels = name_apart(evaluations)
    first = 0 if baseline is None else _find_baseline(evaluations, labels, baseline)
    order = [first, *(index for index in range(len(labels)) if index != first)]
    evaluations, labels = [evaluations[index] for index in order], [labels[index] for index in order]
    check_comparable(evaluations, labels)
    present = evaluations[0].tasks
    tasks = [*(task for task in ZERO_SHOT if task in present), *(task for task in present if task not in ZERO_SHOT)]
    bare = ZeroShot(tuple(evaluations), tuple(labels), tuple(tasks), ())
    contrasts = [contrast for model in range(1, len(labels)) for contrast in _contrasts(bare, model)]
    return replace(bare, contrasts=tuple(_adjust(contrasts)))


def name_apart(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """One short label per evaluation, no two equal: the model's last path component, and more where that repeats."""
    parts = [evaluation.model.replace("\\", "/").rstrip("/").split("/") for evaluation in evaluations]
    labels = [part[-1] for part in parts]
    for added in (
        [part[-2] if len(part) > 1 else "" for part in parts],
        [str(evaluation.config.get("model") or "") for evaluation in evaluations],
        [str(evaluation.config.get("model_dtype") or "") for evaluation in evaluations],
        [evaluation.path.parent.parent.name for evaluation in evaluations],
        [str(evaluation.path) for evaluation in evaluations],
    ):
        own = {label: {a for other, a in zip(labels, added, strict=True) if other == label} for label in labels}
        pairs = zip(labels, added, strict=True)
        labels = [f"{label} ({word})" if word and len(own[label]) > 1 else label for label, word in pairs]
    return tuple(labels)


def check_comparable(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> None:
    """Refuse evaluations that did not ask the same questions in the same way as the first.

    Raises:
        NotComparableError: A results file is given twice, or tasks, versions, shots, limits, items, prompts or
            metrics differ; the message is one line that names the differences.
    """
    files = [evaluation.path.resolve() for evaluation in evaluations]
    for file in files:
        if files.count(file) > 1:
            raise NotComparableError(f"{file}: given {files.count(file)} times; give every result once")
    for label, other in zip(labels[1:], evaluations[1:], strict=True):
        reasons = list(_differences(evaluations[0], other, labels[0], label))
        if reasons:
            more = f"; and {len(reasons) - _SHOWN_REASONS} more" if len(reasons) > _SHOWN_REASONS else ""
            raise NotComparableError(f"not comparable: {'; '.join(reasons[:_SHOWN_REASONS])}{more}")


def _find_baseline(evaluations: Sequence[Evaluation], labels: Sequence[str], name: str) -> int:
    for index, (evaluation, label) in enumerate(zip(evaluations, labels, strict=True)):
        paths = (evaluation.path, evaluation.path.parent, evaluation.given)
        if name in (label, evaluation.model) or Path(name) in paths:
            return index
    raise NotComparableError(f"baseline: no result is called {name!r}; they are called {', '.join(map(repr, labels))}")


def _differences(a: Evaluation, b: Evaluation, label_a: str, label_b: str) -> Iterator[str]:
    for task in [*a.tasks, *(task for task in b.tasks if task not in a.tasks)]:
        if task not in a.tasks or task not in b.tasks:
            yield f"{task}: only in {label_a if task in a.tasks else label_b}"
    if a.limit != b.limit:
        yield f"limit: {_show(a.limit)} in {label_a}, {_show(b.limit)} in {label_b}"
    for key in ("system_instruction", "chat_template"):
        if (a.content.get(key) or None) != (b.content.get(key) or None):
            one, two = ("set" if run.content.get(key) else "none" for run in (a, b))
            yield f"{key}: " + ("not the same text" if one == two else f"{one} in {label_a}, {two} in {label_b}")
    for task in a.tasks:
        if task in b.tasks and (reason := _task_difference(a.tasks[task], b.tasks[task], label_a, label_b)):
            yield f"{task}: {reason}"


def _task_difference(a: TaskResult, b: TaskResult, label_a: str, label_b: str) -> str | None:
    """The first reason, from cause to consequence, why two results of one task are not comparable."""
    if a.shots != b.shots:
        return f"{_show(a.shots)} shots in {label_a}, {_show(b.shots)} in {label_b}"
    if a.version != b.version:
        return f"task version {_show(a.version)} in {label_a}, {_show(b.version)} in {label_b}"
    one, two = ({item.doc_id: item for item in task.items} for task in (a, b))
    lone = []
    for own, other, label in ((one, two, label_a), (two, one, label_b)):
        if missing := [identity for identity in own if identity not in other]:
            lone.append(f"{_items(len(missing))} only in {label}, first doc_id {missing[0]}")
    if lone:
        return ", ".join(lone)
    for field, words in (("doc", "texts"), ("target", "answers"), ("prompt", "prompts"), ("requests", "requests")):
        digests = {identity: (getattr(one[identity], field), getattr(two[identity], field)) for identity in one}
        unequal = [identity for identity, (x, y) in digests.items() if _unequal(field, x, y)]
        if unequal:
            items = _items(len(unequal))
            return f"{items} with other {words} in {label_b} than in {label_a}, first doc_id {unequal[0]}"
    if a.metrics.keys() != b.metrics.keys():
        return f"metrics {', '.join(a.metrics)} in {label_a}, {', '.join(b.metrics)} in {label_b}"
    return None


def _unequal(field: str, one: str, two: str) -> bool:
    return one != two and (field != "requests" or bool(one and two))  # not every release lists all requests


def _items(number: int) -> str:
    return f"{number} item{'s' if number > 1 else ''}"


def _show(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _error(metric: Metric) -> float:
    """The harness's standard error; where it gave none, its formula over the items."""
    if math.isfinite(metric.stderr) or metric.scores is None or len(metric.scores) < 2:
        return metric.stderr
    return float(np.std(metric.scores, ddof=1)) / math.sqrt(len(metric.scores))


def _contrasts(comparison: ZeroShot, model: int) -> Iterator[Contrast]:
    """All of one model's: the average first, then every task's metrics."""
    for metric in comparison.averages():
        names = [(task, comparison.headline(task) if metric == HEADLINE else metric) for task in comparison.averaged]
        if contrast := _contrast(comparison, AVERAGE, metric, names, model):
            yield contrast
    for task in comparison.tasks:
        for metric in comparison.metrics(task):
            if contrast := _contrast(comparison, task, metric, [(task, metric)], model):
                yield contrast


def _contrast(
    comparison: ZeroShot, task: str, metric: str, strata: Sequence[tuple[str, str]], model: int
) -> Contrast | None:
    sides = [
        [comparison.evaluations[side].tasks[name].metrics[own].scores for name, own in strata] for side in (model, 0)
    ]
    pairs = [(a, b) for a, b in zip(*sides, strict=True) if a is not None and b is not None]
    if len(pairs) < len(strata):
        return None
    differences = [a - b for a, b in pairs]
    binary = all(paired.is_binary(side) for pair in pairs for side in pair)
    tables = [paired.table(a, b) for a, b in pairs] if binary else []
    p_value = math.nan
    if binary:
        first, second = [t.first for t in tables], [t.second for t in tables]
        p_value = paired.stratified_mcnemar(first, second, [sum(t) for t in tables])
    return Contrast(
        task=task,
        metric=metric,
        headline=metric == HEADLINE or (task != AVERAGE and metric == comparison.headline(task)),
        model=model,
        items=sum(map(len, differences)),
        score=comparison.score(task, metric, model).value,
        baseline=comparison.score(task, metric, 0).value,
        table=paired.Table(*(sum(column) for column in zip(*tables, strict=True))) if binary else None,
        difference=paired.mean_difference(differences),
        interval=paired.bootstrap(differences),
        stderr=paired.standard_error(differences),
        p_value=p_value,
    )


def _adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Holm's correction over the headline tests: over the models' averages, and over all tasks of all models."""
    adjusted = list(contrasts)
    for average in (True, False):
        family = [
            index
            for index, c in enumerate(contrasts)
            if c.headline and (c.task == AVERAGE) == average and math.isfinite(c.p_value)
        ]
        for index, p in zip(family, paired.holm([contrasts[index].p_value for index in family]), strict=True):
            adjusted[index] = replace(contrasts[index], p_holm=p)
    return adjusted
