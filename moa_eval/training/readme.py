"""Results of a report as a Markdown table for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moa_eval.page import formatting
from moa_eval.training.files import bad_file
from moa_eval.training.runs import AUTOENCODER, LANGUAGE_MODEL

_STATISTICS = ("difference", "relative", "low_95", "high_95")
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
    kinds = [kind for kind in (AUTOENCODER, LANGUAGE_MODEL) if not _missing(table, [*kind.losses])]
    if not kinds:
        raise bad_file(path, "not a table of losses", _REMEDY)
    spaces = kinds[0].losses
    numbers = table[["rate", *(column for loss in spaces for column in _columns(loss))]]
    if any(dtype.kind not in "if" for dtype in numbers.dtypes):
        raise bad_file(path, "has text in place of numbers", _REMEDY)
    heads = [f"{space} | difference | 95 % interval" for space in spaces.values()]
    lines = [f"| | peak rate | seeds | {' | '.join(heads)} |", "|---|---:|---:|" + "---:|---:|---:|" * len(spaces)]
    return "\n".join([*lines, *(_line(row, [*spaces]) for row in table.to_dict("records"))]) + "\n"


def _columns(loss: str) -> list[str]:
    return [f"final_{loss}", f"final_{loss}_sd", *(f"{loss}_{name}" for name in _STATISTICS)]


def _missing(table: Any, losses: Sequence[str]) -> set[str]:
    columns = {"contender", "baseline", "rate", "seeds", *(column for loss in losses for column in _columns(loss))}
    return columns - {*table.columns}


def _line(row: Mapping[str, Any], losses: Sequence[str]) -> str:
    cells = [row["contender"], formatting.UNKNOWN if math.isnan(row["rate"]) else formatting.rate(row["rate"])]
    cells.append(str(row["seeds"]))
    for loss in losses:
        value, sd, gap, relative, low, high = (float(row[column]) for column in _columns(loss))
        spread = f" ± {formatting.deviation(sd)}" if math.isfinite(sd) else ""
        limits = f"{formatting.signed(low)} to {formatting.signed(high)}" if math.isfinite(low) else formatting.UNKNOWN
        cells += [
            formatting.UNKNOWN if math.isnan(value) else formatting.loss(value) + spread,
            formatting.change(gap, relative) if row["baseline"] else "baseline",
            limits if row["baseline"] else "",
        ]
    return f"| {' | '.join(cells)} |"
