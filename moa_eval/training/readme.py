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


def results_markdown(path: str | Path) -> str:
    """Return a report's tables/losses.csv as a Markdown table.

    Raises:
        DataError: The file is unreadable or another table.
    """
    path = Path(path)
    try:
        table: Any = pd.read_csv(path, keep_default_na=False, na_values=["nan"])
        kind = AUTOENCODER if "final_loss_norm" in table else LANGUAGE_MODEL
        numbers = ["rate", *(column for loss in kind.losses for column in _columns(loss))]
        table = table.astype(dict.fromkeys(("method", "baseline", "seeds"), str) | dict.fromkeys(numbers, float))
    except (OSError, ValueError, KeyError) as error:
        raise bad_file(path, f"is no table of losses ({error})", "give the losses.csv of a report") from error
    heads = [f"{space} | difference | 95 % interval" for space in kind.losses.values()]
    lines = [f"| | peak rate | seeds | {' | '.join(heads)} |", "|---|---:|---:|" + "---:|---:|---:|" * len(heads)]
    for row in table.to_dict("records"):
        cells = [row["method"], UNKNOWN if math.isnan(row["rate"]) else rate(row["rate"]), row["seeds"]]
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
