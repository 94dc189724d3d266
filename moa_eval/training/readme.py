"""Results of a report as a Markdown table for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moa_eval.page.formatting import UNKNOWN, change, deviation, rate, signed
from moa_eval.page.formatting import loss as show_loss
from moa_eval.training.files import bad_file
from moa_eval.training.runs import AUTOENCODER, LANGUAGE_MODEL

_REMEDY = "give the losses.csv of a report"


def results_markdown(path: str | Path) -> str:
    """Return a report's tables/losses.csv as a Markdown table.

    Raises:
        DataError: The file is unreadable or another table.
    """
    path = Path(path)
    try:
        table: Any = pd.read_csv(path, keep_default_na=False, na_values=["nan"])
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be read ({error})", _REMEDY) from error
    kind = AUTOENCODER if "final_loss_norm" in table else LANGUAGE_MODEL
    numbers = ["rate", *(column for loss in kind.losses for column in _columns(loss))]
    if missing := [name for name in ("method", "baseline", "seeds", *numbers) if name not in table]:
        raise bad_file(path, f"has no column {missing[0]!r}", _REMEDY)
    if text := [name for name in numbers if table[name].dtype.kind not in "if"]:
        raise bad_file(path, f"column {text[0]!r} is not numeric", _REMEDY)
    heads = [f"{space} | difference | 95 % interval" for space in kind.losses.values()]
    lines = [f"| | peak rate | seeds | {' | '.join(heads)} |", "|---|---:|---:|" + "---:|---:|---:|" * len(heads)]
    for row in table.to_dict("records"):
        cells = [row["method"], UNKNOWN if math.isnan(row["rate"]) else rate(row["rate"]), str(row["seeds"])]
        lines.append(f"| {' | '.join([*cells, *(cell for loss in kind.losses for cell in _cells(row, loss))])} |")
    return "\n".join(lines) + "\n"


def _columns(loss: str) -> list[str]:
    statistics = ("difference", "relative", "low_95", "high_95")
    return [f"final_{loss}", f"final_{loss}_sd", *(f"{loss}_{name}" for name in statistics)]


def _cells(row: Mapping[str, Any], loss: str) -> tuple[str, str, str]:
    value, sd, gap, relative, low, high = (row[column] for column in _columns(loss))
    shown = UNKNOWN if math.isnan(value) else show_loss(value)
    shown += f" ± {deviation(sd)}" if math.isfinite(sd) else ""
    if not row["baseline"]:
        return shown, "baseline", ""
    return shown, change(gap, relative), f"{signed(low)} to {signed(high)}" if math.isfinite(low) else UNKNOWN
