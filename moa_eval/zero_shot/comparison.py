"""Comparison of lm-eval results: comparability checks, and a paired test of every difference to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moa_eval.zero_shot import likelihoods, paired
from moa_eval.zero_shot.paired import ALPHA
from moa_eval.zero_shot.results import Evaluation, Metric, TaskResult
from moa_train.errors import ConfigError, DataError

AVERAGE = "average"
HEADLINE = "headline"
"""Metric of an average: each task's own headline metric."""

CONTINUOUS = (likelihoods.BITS_PER_BYTE, likelihoods.PROBABILITY)


class Task(NamedTuple):
    """Label and headline metric of a task in the paper's table."""

    label: str
    headline: str


# acc_norm divides a choice's log-likelihood by its length in characters, as is usual for choices of unequal length.
# WinoGrande scores the same suffix after both options; lm-eval reports no acc_norm for it.
ZERO_SHOT = {
    "arc_challenge": Task("ARC-C", "acc_norm"),
    "hellaswag": Task("HellaSwag", "acc_norm"),
    "openbookqa": Task("OpenBookQA", "acc_norm"),
    "winogrande": Task("WinoGrande", "acc"),
}


def task_label(task: str) -> str:
    """Return the label of a task in the table."""
    return ZERO_SHOT[task].label if task in ZERO_SHOT else task


@dataclass(frozen=True)
class Model:
    """An evaluation and its label on the page."""

    label: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Measure:
    """A row of the results table: one metric of one task, or an average over tasks with equal weights.

    Attributes:
        task: Name of the task, or `AVERAGE`.
        metric: Name of the metric; "headline", "acc" or one of `CONTINUOUS` for an average.
        headline: Whether this is the headline metric of its task. Only headline metrics are tested together.
        parts: The (task, metric) pairs that are averaged; one pair for a task.
        shots: Number of few-shot examples; None for an average, or if not recorded.
    """

    task: str
    metric: str
    headline: bool
    parts: tuple[tuple[str, str], ...]
    items: int
    shots: int | None = None

    @property
    def label(self) -> str:
        """Label of the task in the table."""
        return "Average" if self.is_average else task_label(self.task)

    @property
    def is_average(self) -> bool:
        """Whether this is an average over tasks."""
        return self.task == AVERAGE

    def value(self, model: Model) -> float:
        """Return a model's value."""
        return float(np.mean([metric.value for metric in self._metrics(model)]))

    def stderr(self, model: Model) -> float:
        """Return the standard error of a model's value over the items."""
        errors = [metric.stderr for metric in self._metrics(model)]
        return math.hypot(*errors) / len(errors)

    def scores(self, model: Model) -> list[NDArray[np.float64]] | None:
        """Return a model's scores per item, one array per part; None if the value is not their mean."""
        scores = [metric.scores for metric in self._metrics(model)]
        known = [part for part in scores if part is not None]
        return known if len(known) == len(scores) else None

    def clusters(self, model: Model) -> list[NDArray[np.int64]]:
        """Return the clusters of the items of each part."""
        return [model.evaluation.tasks[task].clusters for task, _ in self.parts]

    def in_bits(self, model: Model) -> bool:
        """Whether the values are bits per byte, of which fewer are better."""
        return any(metric.in_bits for metric in self._metrics(model))

    def is_fraction(self, models: Sequence[Model]) -> bool:
        """Whether all scores of all models are fractions, so that values can be given in percent."""
        if self.in_bits(models[0]):
            return False
        scores = [self.scores(model) for model in models]
        return all(own is not None and all(part.min() >= 0 and part.max() <= 1 for part in own) for own in scores)

    def _metrics(self, model: Model) -> list[Metric]:
        return [model.evaluation.tasks[task].metrics[metric] for task, metric in self.parts]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Paired test of one model against the baseline in one measure.

    Attributes:
        table: Right and wrong answers of both models, summed over tasks; None for scores other than 0 and 1.
        difference: Value of the model minus that of the baseline.
        interval: Paired bootstrap interval of the difference.
        stderr: Paired standard error of the difference.
        p_value: Exact McNemar test for right and wrong answers, else a paired t-test; both stratified by task and
            clustered.
        p_holm: `p_value` adjusted over the headline measures of all tasks and models, or over the averages of all
            models; NaN if not adjusted.
    """

    measure: Measure
    model: Model
    baseline: Model
    table: paired.Table | None
    difference: float
    interval: paired.Interval
    stderr: float
    p_value: float
    p_holm: float = math.nan

    @property
    def detectable(self) -> float:
        """Smallest true difference that such an evaluation detects with power `paired.POWER`."""
        return paired.detectable(self.stderr)

    @property
    def discordant(self) -> int | None:
        """Number of items that exactly one of the two models answered correctly."""
        return None if self.table is None else self.table.first + self.table.second

    @property
    def significant(self) -> bool:
        """Whether the adjusted test, or without one the interval, excludes a difference of 0."""
        return self.p_holm < ALPHA if math.isfinite(self.p_holm) else self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the same items.

    Attributes:
        models: The baseline first.
        measures: Rows of the results table: the paper's tasks, their averages, other tasks; each with the headline
            metric first.
        contrasts: Every model against the baseline in every measure that has scores per item, averages first.
    """

    models: tuple[Model, ...]
    measures: tuple[Measure, ...]
    contrasts: tuple[Contrast, ...] = ()

    @property
    def baseline(self) -> Model:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def average(self) -> Measure | None:
        """The average over the headline metrics; None for fewer than two of the paper's tasks."""
        return next((measure for measure in self.measures if measure.is_average), None)

    @property
    def primary(self) -> Measure | None:
        """The measure of the verdict: the average, or the headline metric of the only task; None for other sets."""
        headlines = [measure for measure in self.measures if measure.headline]
        paper = [measure for measure in headlines if measure.task in ZERO_SHOT]
        only = paper or headlines
        return self.average or (only[0] if len(only) == 1 else None)

    def continuous(self) -> list[Contrast]:
        """Return the contrasts in bits per byte that differ significantly where those in accuracy do not."""
        primary = self.primary
        if primary is None:
            return []
        equal = [contrast.model for contrast in self.of(primary) if not contrast.significant]
        return [
            contrast
            for contrast in self.contrasts
            if contrast.measure.task == primary.task
            and contrast.measure.metric == likelihoods.BITS_PER_BYTE
            and contrast.model in equal
            and contrast.significant
        ]

    def of(self, measure: Measure | None) -> list[Contrast]:
        """Return the contrasts of a measure, one per model."""
        return [contrast for contrast in self.contrasts if contrast.measure == measure]


def compare_evaluations(evaluations: Sequence[Evaluation], baseline: str | None = None) -> Comparison:
    """Check that evaluations are comparable, and test every difference to the baseline (default: the first).

    `baseline` is a label, a model name or a path.

    Raises:
        DataError: A results file is given twice; or tasks, versions, shots, limits, items, prompts or metrics differ.
        ConfigError: There is no evaluation called `baseline`.
    """
    models = [Model(label, own) for label, own in zip(_labels(evaluations), evaluations, strict=True)]
    first = models[0] if baseline is None else _find(models, baseline)
    models = [first, *(model for model in models if model is not first)]
    _check_comparable(models)
    comparison = Comparison(tuple(models), tuple(_measures(first.evaluation)))
    measures = sorted(comparison.measures, key=lambda measure: not measure.is_average)
    contrasts = [_contrast(measure, model, first) for model in models[1:] for measure in measures]
    return replace(comparison, contrasts=tuple(_adjust([contrast for contrast in contrasts if contrast])))


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return a short label per evaluation: the run or the last part of the path, with more where labels repeat."""
    paths = [Path(evaluation.model) for evaluation in evaluations]
    paths = [path.parent if path.name == "export" and path.parent.name else path for path in paths]
    labels = [path.name or str(path) for path in paths]
    for words in (
        [path.parent.name for path in paths],
        [str(evaluation.config.get("model") or "") for evaluation in evaluations],
        [str(evaluation.config.get("model_dtype") or "") for evaluation in evaluations],
        [evaluation.path.parent.parent.name for evaluation in evaluations],
        [str(evaluation.path) for evaluation in evaluations],
    ):
        pairs = [*zip(labels, words, strict=True)]
        repeated = {label for label, word in pairs if len({other for own, other in pairs if own == label}) > 1}
        labels = [f"{label} ({word})" if label in repeated and word else label for label, word in pairs]
    return labels


def _check_comparable(models: Sequence[Model]) -> None:
    """Raise DataError unless all models answered the same questions under the same settings as the first."""
    files = [model.evaluation.path.resolve() for model in models]
    if repeated := next((file for file in files if files.count(file) > 1), None):
        raise DataError(f"{repeated}: given {files.count(repeated)} times; give each result once")
    for other in models[1:]:
        if reasons := list(_differences(models[0], other)):
            raise DataError(f"not comparable: {'; '.join(reasons)}")


def _find(models: Sequence[Model], name: str) -> Model:
    for model in models:
        run = model.evaluation
        if name in (model.label, run.model) or Path(name) in (run.path, run.path.parent, run.given):
            return model
    labels = ", ".join(repr(model.label) for model in models)
    raise ConfigError(f"baseline: no result is called {name!r}; choose from {labels}")


def _differences(first: Model, other: Model) -> Iterator[str]:
    a, b = first.evaluation, other.evaluation
    for task in dict.fromkeys([*a.tasks, *b.tasks]):
        if task not in a.tasks or task not in b.tasks:
            yield f"{task}: only in {first.label if task in a.tasks else other.label}"
    if a.limit != b.limit:
        yield f"limit: {_limit(a)} in {first.label}, {_limit(b)} in {other.label}"
    for key in ("system_instruction", "chat_template"):
        one, two = a.content.get(key) or None, b.content.get(key) or None
        if one != two:
            yield f"{key} differs between {first.label} and {other.label}"
    for task in a.tasks:
        if task in b.tasks and (reason := a.tasks[task].difference(b.tasks[task], first.label, other.label)):
            yield f"{task}: {reason}"


def _limit(evaluation: Evaluation) -> str:
    return "none" if evaluation.limit is None else f"{evaluation.limit:g}"


def _measures(evaluation: Evaluation) -> Iterator[Measure]:
    tasks = evaluation.tasks
    paper = [tasks[name] for name in ZERO_SHOT if name in tasks]
    for task in paper:
        yield from _task_measures(task)
    if len(paper) > 1:
        items = sum(len(task.items) for task in paper)
        parts = tuple((task.name, _headline_metric(task)) for task in paper)
        yield Measure(AVERAGE, HEADLINE, True, parts, items)
        for metric in ("acc", *CONTINUOUS):
            same = tuple((task.name, metric) for task in paper)
            if same != parts and all(metric in task.metrics for task in paper):
                yield Measure(AVERAGE, metric, False, same, items)
    for name, task in tasks.items():
        if name not in ZERO_SHOT:
            yield from _task_measures(task)


def _task_measures(task: TaskResult) -> Iterator[Measure]:
    first = _headline_metric(task)
    for metric in sorted(task.metrics, key=lambda name: name != first):
        yield Measure(task.name, metric, metric == first, ((task.name, metric),), len(task.items), task.shots)


def _headline_metric(task: TaskResult) -> str:
    """Return the headline metric of a task: the paper's, else acc_norm, acc, or the first with scores per item."""
    preferred = ZERO_SHOT[task.name].headline if task.name in ZERO_SHOT else "acc_norm"
    per_item = [name for name, metric in task.metrics.items() if metric.scores is not None]
    return next(name for name in (preferred, "acc", *per_item, *task.metrics) if name in task.metrics)


def _contrast(measure: Measure, model: Model, baseline: Model) -> Contrast | None:
    ours, theirs = measure.scores(model), measure.scores(baseline)
    if ours is None or theirs is None:
        return None
    differences, clusters = [a - b for a, b in zip(ours, theirs, strict=True)], measure.clusters(baseline)
    tables = [table for a, b in zip(ours, theirs, strict=True) if (table := paired.table(a, b))]
    binary = len(tables) == len(differences)
    return Contrast(
        measure,
        model,
        baseline,
        table=paired.Table(*map(sum, zip(*tables, strict=True))) if binary else None,
        difference=paired.mean_difference(differences),
        interval=paired.bootstrap(differences, clusters),
        stderr=paired.standard_error(differences, clusters),
        p_value=(paired.stratified_mcnemar if binary else paired.t_test)(differences, clusters),
    )


def _adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Apply Holm's correction to the averages of all models, and to the headline metrics of all tasks and models."""
    adjusted = dict.fromkeys(contrasts, math.nan)
    for averages in (True, False):
        tests = [c for c in contrasts if c.measure.headline and c.measure.is_average == averages]
        tests = [c for c in tests if math.isfinite(c.p_value)]
        adjusted |= zip(tests, paired.holm([c.p_value for c in tests]), strict=True)
    return [replace(contrast, p_holm=float(p)) for contrast, p in adjusted.items()]
