"""Harness results -> one section of a page: the paper's zero-shot table, the paired tests and one figure."""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moa_eval.page import formatting
from moa_eval.page.charts import Chart
from moa_eval.page.formatting import show
from moa_eval.page.writing import Row, Section, Series
from moa_eval.training.configuration import config_difference
from moa_eval.zero_shot import paired
from moa_eval.zero_shot.contrasts import (
    AVERAGE,
    HEADLINE,
    ZERO_SHOT,
    Contrast,
    ZeroShot,
    compare_evaluations,
    label_of,
)
from moa_eval.zero_shot.figures import accuracies
from moa_eval.zero_shot.output import Evaluation, read_evaluation
from moa_eval.zero_shot.verdict import ALPHA, averaged, caveats, verdict

_TORCH = re.compile(r"^PyTorch version: (.+)$", re.MULTILINE)
_GPU = re.compile(r"^GPU 0: (.+)$", re.MULTILINE)


def zero_shot_section(
    results: Sequence[str | Path], *, slug: str = "zero-shot", title: str | None = None, baseline: str | None = None
) -> Section:
    """Compare harness results, the first of which is the baseline unless another is named.

    Args:
        results: Folders that lm_eval wrote, or results files.
        slug: Name of the section in file names and ids.
        title: Heading (default: the models' names).
        baseline: A model's name, or one of `results`.

    Raises:
        ResultsError: Results are missing or broken.
        NotComparableError: They did not ask the same questions in the same way, or none is called `baseline`.
    """
    comparison = compare_evaluations([read_evaluation(path) for path in results], baseline)
    settings, differences = settings_rows(comparison), difference_rows(comparison)
    return Section(
        slug=slug,
        title=title or _title(comparison),
        template="zero_shot",
        content={
            "comparison": comparison,
            "labels": comparison.labels,
            "average_of": averaged(comparison) if comparison.averages() else "",
            "cells": _cells(comparison),
            "tests": _tests(comparison),
            "settings": settings,
            "differences": differences,
            "resamples": paired.RESAMPLES,
            "seed": paired.SEED,
        },
        tables={
            "zero_shot": score_rows(comparison),
            "paired": paired_rows(comparison),
            "settings": settings,
            "config": differences,
        },
        charts=draw(comparison),
        verdict=verdict(comparison),
        caveats=caveats(comparison),
        series=[Series(label, label, model) for model, label in enumerate(comparison.labels)],
    )


def score_rows(comparison: ZeroShot) -> list[Row]:
    """Every model's value in every metric of every task, as the harness has it; the averages after their tasks."""
    first = comparison.evaluations[0]
    rows = []
    for task in _ordered(comparison):
        average = task == AVERAGE
        for metric in comparison.averages() if average else comparison.metrics(task):
            for model, label in enumerate(comparison.labels):
                value, stderr = comparison.score(task, metric, model)
                row: Row = {"task": task, "label": label_of(task), "metric": metric}
                row["headline"] = metric == (HEADLINE if average else comparison.headline(task))
                row["shots"] = "" if average else first.tasks[task].shots
                row["items"] = comparison.items if average else len(first.tasks[task].items)
                rows.append(row | {"model": label, "value": value, "stderr": stderr})
    return rows


def paired_rows(comparison: ZeroShot) -> list[Row]:
    """Every contrast with the baseline, as plain values; counts are NaN for scores other than right and wrong."""
    rows = []
    for c in comparison.contrasts:
        table = c.table or (math.nan,) * 4
        rows.append(
            {
                "task": c.task,
                "label": label_of(c.task),
                "metric": c.metric,
                "headline": c.headline,
                "model": comparison.labels[c.model],
                "baseline": comparison.labels[0],
                "items": c.items,
                **dict(
                    zip(("both_right", "only_model_right", "only_baseline_right", "none_right"), table, strict=True)
                ),
                "model_value": c.score,
                "baseline_value": c.baseline,
                "difference": c.difference,
                "low_95": c.interval.low,
                "high_95": c.interval.high,
                "standard_error": c.stderr,
                "detectable": c.detectable,
                "p_value": c.p_value,
                "p_holm": c.p_holm,
            }
        )
    return rows


def settings_rows(comparison: ZeroShot) -> list[Row]:
    """How each result came about, one column per model; what no result records is left out."""
    settings = [_settings(evaluation) for evaluation in comparison.evaluations]
    return [
        {"key": key} | {label: own[key] or "–" for label, own in zip(comparison.labels, settings, strict=True)}
        for key in settings[0]
        if any(own[key] for own in settings)
    ]


def difference_rows(comparison: ZeroShot) -> list[Row]:
    """The keys of the harness's settings and of the tasks' files that differ, one column per model."""
    configs = [
        evaluation.config
        | {name: {k: v for k, v in t.config.items() if k != "metadata"} for name, t in evaluation.tasks.items()}
        for evaluation in comparison.evaluations
    ]  # the metadata repeat the model's arguments
    return [
        {"key": key} | dict(zip(comparison.labels, map(show, values), strict=True))
        for key, values in config_difference(configs).items()
    ]


def draw(comparison: ZeroShot) -> dict[str, Chart]:
    """The figure of all accuracies; none where no task has a score between 0 and 1 per item."""
    shown = []
    for task in _ordered(comparison):
        metric = HEADLINE if task == AVERAGE else comparison.headline(task)
        if comparison.is_fraction(task, metric):
            shown.append((label_of(task), [comparison.score(task, metric, m) for m in range(len(comparison.labels))]))
    if not shown:
        return {}
    scores = 100 * np.array([row for _, row in shown])  # (tasks, models, value and error)
    labels = [label for label, _ in shown]
    return {"accuracy": accuracies(labels, comparison.labels, scores[..., 0], scores[..., 1], "accuracy")}


def _ordered(comparison: ZeroShot) -> list[str]:
    """The rows of the table: the paper's tasks, their average, then what else there is."""
    average = [AVERAGE] if comparison.averages() else []
    return [*comparison.averaged, *average, *(task for task in comparison.tasks if task not in ZERO_SHOT)]


def _settings(evaluation: Evaluation) -> dict[str, str]:
    """What a reader asks about a result, as text; empty where it is not recorded."""
    content, config = evaluation.content, evaluation.config
    environment = str(content.get("pretty_env_info") or "")
    arguments = ",".join(f"{key}={show(value)}" for key, value in config["model_args"].items())
    shots = {label_of(name): task.shots for name, task in evaluation.tasks.items()}
    same = len(set(shots.values())) == 1
    seconds, date = _number(content.get("total_evaluation_time_seconds")), _number(content.get("date"))
    parameters = _number(config.get("model_num_parameters"))
    return {
        "model type": _text(config.get("model")),
        "model arguments": arguments,
        "parameters": formatting.count(parameters, 4) if parameters > 0 else "",
        "dtype": _text(config.get("model_dtype")),
        "revision": _text(config.get("model_sha")) or _text(config.get("model_revision")),
        "context length": _text(content.get("max_length")),
        "batch size": _text(config.get("batch_size")),
        "device": _text(config.get("device")),
        "shots": show(next(iter(shots.values()))) if same else ", ".join(f"{k} {show(v)}" for k, v in shots.items()),
        "limit": "none" if evaluation.limit is None else f"{evaluation.limit:g}",
        "few-shot seed": _text(config.get("fewshot_seed")),
        "lm-eval": _text(content.get("lm_eval_version")),
        "transformers": _text(content.get("transformers_version")),
        "torch": match[1] if (match := _TORCH.search(environment)) else "",
        "GPU": match[1] if (match := _GPU.search(environment)) else "",
        "git commit": _text(content.get("git_hash")),
        "started": f"{datetime.fromtimestamp(date, UTC):%Y-%m-%d %H:%M:%S} UTC" if math.isfinite(date) else "",
        "time": formatting.duration(seconds) if math.isfinite(seconds) else "",
        "results file": str(evaluation.path),
    }


def _text(value: Any) -> str:
    return "" if value is None or value == "" else show(value)


def _number(value: Any) -> float:
    """A number that the harness may have written as text; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _title(comparison: ZeroShot) -> str:
    baseline, *others = comparison.labels
    if not others:
        return f"{baseline}: zero-shot accuracy"
    return f"{', '.join(others) if len(others) <= 2 else f'{len(others)} models'} against {baseline}"


def _cells(comparison: ZeroShot) -> list[Row]:
    """The paper's table as text: per task its headline metric, then its others, each with one score per model."""
    first = comparison.evaluations[0]
    rows = []
    for task in _ordered(comparison):
        lines = []
        for metric in comparison.averages() if task == AVERAGE else comparison.metrics(task):
            shown = formatting.accuracy if comparison.is_fraction(task, metric) else formatting.loss
            scores = (comparison.score(task, metric, model) for model in range(len(comparison.labels)))
            texts = [
                f"{shown(value)}\u00a0±\u00a0{shown(error)}" if math.isfinite(error) else shown(value)
                for value, error in scores
            ]
            lines.append({"metric": metric, "scores": texts})
        row: Row = {"label": label_of(task), "lines": lines, "average": task == AVERAGE}
        row["size"] = comparison.items if task == AVERAGE else len(first.tasks[task].items)
        row["shots"] = None if task == AVERAGE else first.tasks[task].shots
        rows.append(row | {"extra": task not in ZERO_SHOT and task != AVERAGE})
    return rows


def _tests(comparison: ZeroShot) -> list[Row]:
    """Every other model with its contrasts as text, in the order of the table; the headline metrics first."""
    order = _ordered(comparison)
    tables = []
    for model in range(1, len(comparison.labels)):
        own = [contrast for contrast in comparison.contrasts if contrast.model == model]
        own.sort(key=lambda contrast: (not contrast.headline, order.index(contrast.task)))
        tables.append({"model": model, "rows": [_test(comparison, contrast) for contrast in own]})
    return tables


def _test(comparison: ZeroShot, contrast: Contrast) -> Row:
    shown = formatting.points if comparison.is_fraction(contrast.task, contrast.metric) else formatting.signed
    return {
        "label": label_of(contrast.task),
        "metric": contrast.metric,
        "headline": contrast.headline,
        "average": contrast.task == AVERAGE,
        "size": contrast.items,
        "table": contrast.table,
        "difference": shown(contrast.difference),
        "interval": " to ".join(map(shown, contrast.interval)),
        "p_value": formatting.probability(contrast.p_value),
        "p_holm": formatting.probability(contrast.p_holm),
        "detectable": shown(contrast.detectable).lstrip("+"),
        "seen": contrast.p_holm < ALPHA,
    }
