"""Measured cases as a Markdown table on stdout and a CSV file."""

from __future__ import annotations

import csv
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import Case
from moa_train.environment import cpu_name

Column = tuple[str, Callable[[Case], str]]
"""Heading, and the text of a case's cell."""

UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def times(unit: str = "s") -> list[Column]:
    """Return columns with median, 20th and 80th percentile of the rounds, in a unit of `UNITS`."""
    scale = UNITS[unit]
    return [
        (f"median {unit}", lambda case: f"{scale * case.median_s:.4g}"),
        ("p20", lambda case: f"{scale * np.percentile(case.seconds, 20):.4g}"),
        ("p80", lambda case: f"{scale * np.percentile(case.seconds, 80):.4g}"),
    ]


def rate(unit: str, scale: float = 1) -> Column:
    """Return a column with items per second at the median time, in units of `scale` items."""
    return f"{unit}/s", lambda case: f"{case.items / case.median_s / scale:,.4g}"


def time_ratio(heading: str = "time ratio") -> list[Column]:
    """Return columns with time per item over the baseline's: median of the rounds and percentiles."""
    return _ratio(heading, Case.time_ratios)


def speed_ratio(heading: str = "speed ratio") -> list[Column]:
    """Return columns with the inverse of the time ratio."""
    return _ratio(heading, lambda case: [1 / value for value in case.time_ratios()])


def _ratio(heading: str, ratios: Callable[[Case], list[float]]) -> list[Column]:
    def spread(case: Case) -> str:
        low, high = np.percentile(ratios(case), [20, 80])
        return f"{low:.3f}-{high:.3f}"

    return [(heading, lambda case: f"{statistics.median(ratios(case)):.3f}"), ("p20-p80", spread)]


def memory() -> list[Column]:
    """Return columns with peak memory and its ratio to the baseline's."""

    def ratio(case: Case) -> str:
        own, other = case.peak_mib, case.reference.peak_mib
        return f"{own / other:.3f}" if own is not None and other else ""

    return [("peak MiB", lambda case: f"{case.peak_mib:,.1f}"), ("memory ratio", ratio)]


def note(heading: str) -> Column:
    """Return a column with the cases' notes under this heading."""
    return heading, lambda case: case.notes.get(heading, "")


def report(
    title: str, cases: Sequence[Case], columns: Sequence[Column], device: torch.device, out: Path, remark: str = ""
) -> None:
    """Print a Markdown table below device, versions and `remark`, and write it as CSV to `out`.

    The CSV file is named after the part of `title` before the colon and has no thousands separators.
    """
    labels = list(cases[0].labels)
    heading = [*labels, *(name for name, _ in columns)]
    rows = [[*(case.labels[name] for name in labels), *(text(case) for _, text in columns)] for case in cases]
    print(f"\n### {title}\n\n{environment(device)}. {remark}\n")
    for row in (heading, ["---"] * len(heading), *rows):
        print(f"| {' | '.join(row)} |", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{title.partition(':')[0].lower()}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *([_plain(cell) for cell in row] for row in rows)])


def _plain(cell: str) -> str:
    return cell.replace(",", "") if re.fullmatch(r"-?[\d,]+(\.\d+)?", cell) else cell


def environment(device: torch.device) -> str:
    """Return device and versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {versions}, CUDA {torch.version.cuda}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads; {versions}"
