"""Figure of zero-shot results: accuracies with 95 % intervals."""

from __future__ import annotations

import altair as alt
import numpy as np
from scipy import stats

from moa_eval.page import charts
from moa_eval.zero_shot.comparison import Comparison


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
