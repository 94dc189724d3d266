"""The table of results for a README, from a report's CSV."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moa_eval.page import formatting
from moa_eval.training.reading import RunFolderError
from moa_eval.training.runs import AUTOENCODER, LANGUAGE_MODEL

_COLUMNS = ("difference", "relative", "low_95", "high_95")  # of a loss, beside its mean and deviation


def results_markdown(losses: str | Path) -> str:
    """The table of results for a README, from a report's tables/losses.csv.

    Raises:
        RunFolderError: The file cannot be read or is another table.
    """
    path = Path(losses)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); give the losses.csv of a report") from None
    columns = set(rows[0]) if rows else set()
    kinds = [kind for kind in (AUTOENCODER, LANGUAGE_MODEL) if {f"final_{loss}" for loss in kind.losses} <= columns]
    if not kinds:
        raise RunFolderError(f"{path}: not a table of losses; give the losses.csv of a report")
    spaces = kinds[0].losses
    heads = [f"{space} | difference | 95 % interval" for space in spaces.values()]
    lines = [f"| | peak rate | seeds | {' | '.join(heads)} |", "|---|---:|---:|" + "---:|---:|---:|" * len(spaces)]
    # Tables from before there were sizes do not name the baseline: it is the first.
    try:
        lines += [_results_line(row, [*spaces], baseline=not row.get("baseline", row is not rows[0])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: a row is damaged ({error!r}); write the report again") from None
    return "\n".join(lines) + "\n"


def _results_line(row: Mapping[str, str], losses: Sequence[str], *, baseline: bool) -> str:
    rate = float(row["rate"])
    cells = [row["contender"], formatting.UNKNOWN if math.isnan(rate) else formatting.rate(rate), row["seeds"]]
    for loss in losses:
        value, sd, gap, relative, low, high = (
            float(row[key])
            for key in (f"final_{loss}", f"final_{loss}_sd", *(f"{loss}_{column}" for column in _COLUMNS))
        )
        spread = f" ± {formatting.deviation(sd)}" if math.isfinite(sd) else ""
        limits = f"{formatting.signed(low)} to {formatting.signed(high)}" if math.isfinite(low) else formatting.UNKNOWN
        cells += [
            formatting.UNKNOWN if math.isnan(value) else formatting.loss(value) + spread,
            "baseline" if baseline else formatting.change(gap, relative),
            "" if baseline else limits,
        ]
    return f"| {' | '.join(cells)} |"
