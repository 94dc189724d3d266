"""Measured cases -> a Markdown table on stdout and a CSV file."""

import csv
import importlib.metadata
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .measure import Case, percentile

Column = tuple[str, Callable[[Case], str]]
"""Head, and the text of a case's cell."""

UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def times(unit: str = "s", per: str = "") -> list[Column]:
    """Median, 20th and 80th percentile of the rounds, in a unit of `UNITS`; of a run, or of one of the so many
    `per` that the case notes that a run has.
    """

    def scale(case: Case) -> float:
        return UNITS[unit] / int(case.notes.get(per, "1"))

    return [
        (f"median {unit}/{per}" if per else f"median {unit}", lambda case: f"{scale(case) * case.median_s:.4g}"),
        ("p20", lambda case: f"{scale(case) * percentile(case.seconds, 20):.4g}"),
        ("p80", lambda case: f"{scale(case) * percentile(case.seconds, 80):.4g}"),
    ]


def rate(unit: str, scale: float = 1) -> Column:
    """Items a second at the median time; `unit` is called so many (`scale`) items."""
    return f"{unit}/s", lambda case: f"{case.items / case.median_s / scale:,.4g}"


def time_ratio(head: str = "time ratio") -> list[Column]:
    """Time an item over the baseline's, above 1 is slower: median of the rounds, 20th to 80th percentile."""
    return _ratio(head, Case.time_ratios)


def speed_ratio(head: str = "speed ratio") -> list[Column]:
    """The inverse, above 1 is faster."""
    return _ratio(head, lambda case: [1 / value for value in case.time_ratios()])


def _ratio(head: str, ratios: Callable[[Case], list[float]]) -> list[Column]:
    def spread(case: Case) -> str:
        return f"{percentile(ratios(case), 20):.3f}-{percentile(ratios(case), 80):.3f}"

    return [(head, lambda case: f"{statistics.median(ratios(case)):.3f}"), ("p20-p80", spread)]


def memory() -> list[Column]:
    """Peak memory and its ratio to the baseline's."""

    def ratio(case: Case) -> str:
        own, other = case.peak_mib, case.reference.peak_mib
        return f"{own / other:.3f}" if own is not None and other else ""

    return [("peak MiB", lambda case: f"{case.peak_mib:,.1f}"), ("memory ratio", ratio)]


def note(head: str) -> Column:
    """What the case notes under this head."""
    return head, lambda case: case.notes.get(head, "")


def report(
    title: str, cases: Sequence[Case], columns: Sequence[Column], device: torch.device, out: Path, remark: str = ""
) -> None:
    """Print the cases as a Markdown table below device, versions and `remark`, and write it to `out`.

    The CSV file is named after what stands before the colon of `title`.
    """
    labels = list(cases[0].labels)
    lines = [[*(case.labels[name] for name in labels), *(text(case) for _, text in columns)] for case in cases]
    write(title, [*labels, *(head for head, _ in columns)], lines, device, out, remark)


def write(
    title: str, head: Sequence[str], lines: Sequence[Sequence[str]], device: torch.device, out: Path, remark: str
) -> None:
    """`report` for lines that are already text. Numbers have no thousands separators in the CSV file."""
    print(f"\n### {title}\n\n{environment(device)}. {remark}\n")
    for line in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(line)} |", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{title.split(':')[0].strip().lower()}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *([_plain(cell) for cell in line] for line in lines)])


def _plain(cell: str) -> str:
    return cell.replace(",", "") if re.fullmatch(r"-?[\d,]+(\.\d+)?", cell) else cell


def environment(device: torch.device) -> str:
    """Device and versions, for the line above each table."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if device.type != "cuda":
        return f"{cpu_name()}, {torch.get_num_threads()} threads; {', '.join(versions)}"
    versions += [f"CUDA {torch.version.cuda}", *(f"{name} {v}" for name in ("triton",) if (v := _version(name)))]
    return f"{torch.cuda.get_device_name(device)}; {', '.join(versions)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
