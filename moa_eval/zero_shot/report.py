"""Page section of lm-eval results: verdict, zero-shot table, paired tests and figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import altair as alt
import numpy as np
from scipy import stats

from moa_eval.page import charts, formatting, writing
from moa_eval.page.formatting import show
from moa_eval.page.writing import Row, Section, Series
from moa_eval.training.configuration import config_difference
from moa_eval.zero_shot import paired
from moa_eval.zero_shot.comparison import ZERO_SHOT, Comparison, Contrast, Measure, compare_evaluations, task_label
from moa_eval.zero_shot.results import read_evaluation


def zero_shot_section(
    results: Sequence[str | Path], *, slug: str = "zero-shot", title: str | None = None, baseline: str | None = None
) -> Section:
    """Return the page section that compares folders that lm-eval wrote, or results files.

    `slug` names the section in file names and ids. The default baseline is the first result, and the default title
    has the models' labels.

    Raises:
        DataError: Results are missing, damaged, or not comparable.
        ConfigError: There is no result called `baseline`.
    """
    comparison = compare_evaluations([read_evaluation(path) for path in results], baseline)
    labels = [model.label for model in comparison.models]
    tables = {
        "zero_shot": score_rows(comparison),
        "paired": [_paired_row(contrast) for contrast in comparison.contrasts],
        "config": difference_rows(comparison),
    }
    return Section(
        slug=slug,
        title=title or _title(labels),
        template="zero_shot",
        content={
            "labels": labels,
            "average_of": averaged_tasks(comparison) if comparison.average else "",
            "cells": _cells(comparison),
            "tests": _tests(comparison),
            "differences": tables["config"],
            "resamples": paired.RESAMPLES,
            "seed": paired.SEED,
        },
        tables=tables,
        charts=draw(comparison),
        verdict=sentences("zero_shot_verdict.txt", comparison),
        caveats=sentences("zero_shot_caveats.txt", comparison),
        series=[Series(label, label, run) for run, label in enumerate(labels)],
    )


def sentences(template: str, comparison: Comparison) -> list[str]:
    """Return the sentences of a text template about a comparison."""
    runs = [model.evaluation for model in comparison.models]
    primary = comparison.of(comparison.primary)
    tests = [c for c in comparison.contrasts if math.isfinite(c.p_holm) and not c.measure.is_average]
    plain = next((m for m in comparison.measures if m.is_average and not m.headline), None)
    return writing.sentences(
        template,
        comparison=comparison,
        models=comparison.models,
        baseline=comparison.baseline,
        tasks=averaged_tasks(comparison),
        primary=primary,
        best=max(primary, key=lambda contrast: contrast.measure.value(contrast.model), default=None),
        plain=comparison.of(plain),
        tests=tests,
        significant=[test for test in tests if test.significant],
        missing=[task.label for name, task in ZERO_SHOT.items() if name not in runs[0].tasks],
        shots={task_label(name): task.shots for name, task in runs[0].tasks.items() if task.shots},
        settings={
            "Model types": [show(run.config.get("model")) for run in runs],
            "Dtypes": [show(run.config.get("model_dtype")) for run in runs],
            "Context lengths": [show(run.content.get("max_length")) for run in runs],
            "lm-eval versions": [show(run.content.get("lm_eval_version")) for run in runs],
            "transformers versions": [show(run.content.get("transformers_version")) for run in runs],
            "Code versions": [show(run.content.get("git_hash")) for run in runs],
        },
    )


def averaged_tasks(comparison: Comparison) -> str:
    """Return the names of the paper's tasks that are present; "the four tasks" if all are."""
    names = [task.label for name, task in ZERO_SHOT.items() if name in comparison.baseline.evaluation.tasks]
    return "the four tasks" if len(names) == len(ZERO_SHOT) else ", ".join(names)


def score_rows(comparison: Comparison) -> list[Row]:
    """Return every model's value in every measure."""
    return [
        {
            "task": measure.task,
            "label": measure.label,
            "metric": measure.metric,
            "headline": measure.headline,
            "shots": "" if measure.is_average else measure.shots,
            "items": measure.items,
            "model": model.label,
            "value": measure.value(model),
            "stderr": measure.stderr(model),
        }
        for measure in comparison.measures
        for model in comparison.models
    ]


def difference_rows(comparison: Comparison) -> list[Row]:
    """Return the keys of lm-eval's settings and task configs that differ, one column per model."""
    configs = []
    for run in (model.evaluation for model in comparison.models):
        # without the metadata, which repeat the model arguments
        tasks = {name: {k: v for k, v in task.config.items() if k != "metadata"} for name, task in run.tasks.items()}
        configs.append(run.config | tasks)
    labels = [model.label for model in comparison.models]
    return [
        {"key": key} | dict(zip(labels, map(show, values), strict=True))
        for key, values in config_difference(configs).items()
    ]


def draw(comparison: Comparison) -> dict[str, charts.Chart]:
    """Draw the headline accuracies of all models; no chart if no task has scores in [0, 1]."""
    models = comparison.models
    measures = [m for m in comparison.measures if m.headline and m.is_fraction(models)]
    if not measures:
        return {}
    tasks, labels = [measure.label for measure in measures], [model.label for model in models]
    points = []
    for measure in measures:
        for run, model in enumerate(models):
            accuracy = 100 * measure.value(model)
            half = 100 * stats.norm.ppf(0.975) * np.nan_to_num(measure.stderr(model))
            interval = {"low": accuracy - half, "high": accuracy + half}
            points.append({"run": run, "model": model.label, "task": measure.label, "accuracy": accuracy} | interval)
    data = alt.Chart(alt.InlineData(values=points))
    place = {
        "y": alt.Y("task:N").sort(tasks).title(None).axis(labelColor=charts.INK, labelFontSize=12),
        "yOffset": alt.YOffset("model:N").sort(labels).scale(domain=labels, paddingOuter=0.8),
        "color": alt.Color("model:N").scale(charts.colours(labels)),
    }
    x = alt.X("accuracy:Q").title("accuracy, %").scale(zero=False).axis(grid=True, gridColor=charts.GRID, tickCount=6)
    tooltip = [
        alt.Tooltip("model:N"),
        alt.Tooltip("task:N"),
        alt.Tooltip("accuracy:Q").title("accuracy, %").format(".2f"),
        alt.Tooltip("low:Q").title("95 % from").format(".2f"),
        alt.Tooltip("high:Q").title("to").format(".2f"),
    ]
    layers = [
        data.mark_rule(strokeWidth=1.5).encode(
            **place, x=alt.X("low:Q").scale(zero=False), x2=alt.X2("high:Q"), tooltip=tooltip
        ),
        data.mark_point(filled=True, size=45, opacity=1).encode(
            **place, x=x, shape=alt.Shape("model:N").scale(charts.shapes(labels)), tooltip=tooltip
        ),
    ]
    height = len(tasks) * (18 + 12 * len(labels))
    title = "Accuracy, with 95 % intervals over items"
    return {"accuracy": charts.draw("accuracy", title, alt.layer(*layers), height=height)}


def _paired_row(contrast: Contrast) -> Row:
    counts = contrast.table or (math.nan,) * 4
    return {
        "task": contrast.measure.task,
        "label": contrast.measure.label,
        "metric": contrast.measure.metric,
        "headline": contrast.measure.headline,
        "model": contrast.model.label,
        "baseline": contrast.baseline.label,
        "items": contrast.measure.items,
        **dict(zip(("both_right", "only_model_right", "only_baseline_right", "none_right"), counts, strict=True)),
        "model_value": contrast.measure.value(contrast.model),
        "baseline_value": contrast.measure.value(contrast.baseline),
        "difference": contrast.difference,
        "low_95": contrast.interval.low,
        "high_95": contrast.interval.high,
        "standard_error": contrast.stderr,
        "detectable": contrast.detectable,
        "p_value": contrast.p_value,
        "p_holm": contrast.p_holm,
    }


def _cells(comparison: Comparison) -> list[Row]:
    """Return the results table as text: one row per task, one line per metric, one score per model."""
    rows = []
    for _, measures in groupby(comparison.measures, key=lambda measure: measure.task):
        first, *_ = measures = list(measures)
        row = {"label": first.label, "average": first.is_average, "size": first.items, "shots": first.shots}
        row["extra"] = not first.is_average and first.task not in ZERO_SHOT
        row["lines"] = [{"metric": measure.metric, "scores": _scores(measure, comparison)} for measure in measures]
        rows.append(row)
    return rows


def _scores(measure: Measure, comparison: Comparison) -> list[str]:
    shown = formatting.accuracy if measure.is_fraction(comparison.models) else formatting.loss
    values = [(measure.value(model), measure.stderr(model)) for model in comparison.models]
    return [f"{shown(v)}\u00a0±\u00a0{shown(error)}" if math.isfinite(error) else shown(v) for v, error in values]


def _tests(comparison: Comparison) -> list[Row]:
    """Return every model's contrasts as text: headline measures first, each in the order of the results table."""
    order = {measure: (not measure.headline, place) for place, measure in enumerate(comparison.measures)}
    contrasts = sorted(comparison.contrasts, key=lambda contrast: order[contrast.measure])
    return [
        {"run": run, "rows": [_test_row(contrast, comparison) for contrast in contrasts if contrast.model is model]}
        for run, model in enumerate(comparison.models)
        if run > 0
    ]


def _test_row(contrast: Contrast, comparison: Comparison) -> Row:
    shown = formatting.points if contrast.measure.is_fraction(comparison.models) else formatting.signed
    return {
        "measure": contrast.measure,
        "table": contrast.table,
        "difference": shown(contrast.difference),
        "interval": " to ".join(map(shown, contrast.interval)),
        "p_value": formatting.probability(contrast.p_value),
        "p_holm": formatting.probability(contrast.p_holm),
        "detectable": shown(contrast.detectable).lstrip("+"),
        "significant": contrast.p_holm < paired.ALPHA,
    }


def _title(labels: Sequence[str]) -> str:
    baseline, *others = labels
    if not others:
        return f"{baseline}: zero-shot accuracy"
    return f"{', '.join(others) if len(others) <= 2 else f'{len(others)} models'} against {baseline}"
