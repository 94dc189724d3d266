"""What the figure of harness results shows: accuracies with their intervals."""

from collections.abc import Sequence

import altair as alt
import numpy as np
from numpy.typing import NDArray

from moa_eval.page.charts import GRID, INK, Chart, colours, draw, shapes

_Z_95 = 1.959964  # half the width of a normal 95 % interval, in standard errors


def accuracies(
    rows: Sequence[str],
    labels: Sequence[str],
    values: NDArray[np.float64],
    errors: NDArray[np.float64],
    name: str,
) -> Chart:
    """Accuracies of several models in several tasks, as points with their normal 95 % intervals.

    Args:
        rows: What to call each task, from top to bottom.
        labels: What to call each model; the first is the baseline.
        values, errors: Percent (tasks, models), the standard errors NaN where unknown.
        name: The figure's name.
    """
    half = _Z_95 * np.nan_to_num(errors)
    points = [
        {"run": model, "model": label, "task": task, "accuracy": float(values[row, model])}
        | {"low": float((values - half)[row, model]), "high": float((values + half)[row, model])}
        for row, task in enumerate(rows)
        for model, label in enumerate(labels)
    ]
    data = alt.Chart(alt.InlineData(values=points))
    place = {
        "y": alt.Y("task:N").sort(list(rows)).title(None).axis(labelColor=INK, labelFontSize=12),
        "yOffset": alt.YOffset("model:N").sort(list(labels)).scale(domain=list(labels), paddingOuter=0.8),
        "color": alt.Color("model:N").scale(colours(labels)),
    }
    x = alt.X("accuracy:Q").title("accuracy, %").scale(zero=False).axis(grid=True, gridColor=GRID, tickCount=6)
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
            **place, x=x, shape=alt.Shape("model:N").scale(shapes(labels)), tooltip=tooltip
        ),
    ]
    height = len(rows) * (18 + 12 * len(labels))
    return draw(name, "Accuracy, with 95 % intervals over items", alt.layer(*layers), height=height)
