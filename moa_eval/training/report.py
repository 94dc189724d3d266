"""Runs -> tables, figures and one page. The tables are made once, here; CSV, Markdown and HTML show the same rows."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from moa_eval.page.charts import PALETTE, Plot
from moa_eval.page.writing import Row, as_csv, figure_files, render, write
from moa_eval.training import figures as plots
from moa_eval.training.comparison import Comparison, compare, mean, quotient, role, show
from moa_eval.training.runs import Columns, Run, read_run
from moa_eval.training.verdict import SPACES, caveats, verdict

Tables = dict[str, list[Row]]

COSTS = {  # column of cost.csv -> where a run keeps it; every one also gets its ratio to the baseline
    "parameters": lambda run: run.figure("parameters", "total"),
    "mixing_parameters": lambda run: run.figure("parameters", "mixing"),
    "training_flops_per_image": lambda run: run.figure("flops_per_sample"),
    "images_per_s": lambda run: run.throughput,
    "peak_memory_mib": lambda run: run.figure("peak_memory_mib"),
    "training_time_s": lambda run: run.wall_s,
}
SHOWN_IMAGES = 12  # on the page; reconstructions.csv has them all


class Written(NamedTuple):
    """A report on disk: the path of its page, and its verdict in words."""

    page: Path
    verdict: str


def write_report(
    folders: Sequence[str | Path], out: str | Path, *, title: str | None = None, strict: bool = False
) -> Written:
    """Compare run folders, the first of which is the baseline, and write the report.

    Writes `out`/index.html (self-contained), summary.md, figures/*.{svg,png} and tables/*.csv.

    Raises:
        RunFolderError: A run folder is missing or broken.
        NotComparableError: A folder is given twice; or `strict`, and the runs are not comparable.
    """
    comparison = compare([read_run(folder) for folder in folders], strict=strict)
    tables = make_tables(comparison)
    figures = plots.draw(comparison)
    pages = _render(comparison, tables, figures, title)
    out = Path(out)
    files = {f"tables/{name}.csv": as_csv(rows) for name, rows in tables.items()}
    write(out, files | figure_files(figures) | pages)
    return Written(out / "index.html", " ".join(verdict(comparison)))


def make_tables(comparison: Comparison) -> Tables:
    """Every table by name, as rows of plain values; differences and ratios are to the first run."""
    labelled = list(zip(comparison.labels, comparison.runs, strict=True))
    return {
        "losses": loss_rows(comparison),
        "seeds": seed_rows(comparison),
        "costs": cost_rows(comparison),
        "validation": [row for label, run in labelled for row in _curve_rows(label, run.validation)],
        "train": [row for label, run in labelled for row in _curve_rows(label, run.train)],
        "reconstructions": [row for label, run in labelled for row in _reconstruction_rows(label, run)],
        "config": [
            {"key": key, "kind": role(key, values), **dict(zip(comparison.labels, map(show, values), strict=True))}
            for key, values in comparison.differing.items()
        ],
        "environment": environment_rows(comparison, packages=False),
        "packages": environment_rows(comparison, packages=True),
    }


def loss_rows(comparison: Comparison) -> list[Row]:
    """Final and best validation loss of every run in both spaces; "best" is the lowest of all its validations."""
    baseline = comparison.runs[0].validation
    rows = []
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        row: Row = {"run": label, "name": run.name, "seed": run.seed, "status": run.status, "samples": run.samples}
        for loss in SPACES:
            for kind, pick in (("final", _final), ("best", _best)):
                value, reference = pick(run.validation[loss]), pick(baseline[loss])
                row[f"{kind}_{loss}"] = value
                row[f"{kind}_{loss}_difference"] = value - reference
                row[f"{kind}_{loss}_relative"] = quotient(value - reference, reference)
        rows.append(row)
    return rows


def seed_rows(comparison: Comparison) -> list[Row]:
    """Every arm against the baseline's at the last validation they share, over seeds, in both spaces."""
    rows = []
    for loss in SPACES:
        for contrast in comparison.contrasts(loss):
            values, baseline = [*contrast.values.values()], [*contrast.baseline.values()]
            rows.append(
                {
                    "arm": comparison.arms[contrast.arm].label,
                    "baseline": comparison.arms[0].label,
                    "loss": loss,
                    "samples": contrast.samples,
                    "seeds": len(values),
                    "baseline_seeds": len(baseline),
                    "mean": mean(values),
                    "standard_deviation": _deviation(values),
                    "baseline_mean": mean(baseline),
                    "baseline_standard_deviation": _deviation(baseline),
                    "difference": contrast.interval.mean,
                    "relative": contrast.relative,
                    "low_95": contrast.interval.low,
                    "high_95": contrast.interval.high,
                    "interval": "paired t" if contrast.interval.paired else "Welch t",
                }
            )
    return rows


def cost_rows(comparison: Comparison) -> list[Row]:
    """What every run costs, with the ratio to the first run; NaN where it is not known."""
    rows = []
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        row: Row = {"run": label, "device": run.device}
        for name, read in COSTS.items():
            row[name] = read(run)
            row[f"{name}_ratio"] = quotient(read(run), read(comparison.runs[0]))
        row["mixing_share"] = quotient(row["mixing_parameters"], row["parameters"])
        rows.append(row)
    return rows


def environment_rows(comparison: Comparison, *, packages: bool) -> list[Row]:
    """The environments by key, one column per run: the versions of the packages, or everything else."""
    shown = [run.environment.get("packages", {}) if packages else run.environment for run in comparison.runs]
    keys = dict.fromkeys(key for values in shown for key in values if key != "packages")
    return [
        {"key": key} | {label: show(values.get(key)) for label, values in zip(comparison.labels, shown, strict=True)}
        for key in keys
    ]


def gallery(runs: Sequence[Run], limit: int = SHOWN_IMAGES) -> list[Row]:
    """The held-out images of the first run that has any, each with every run's own reconstruction of the same key.

    A row holds key, original, masked (data URIs), pixelated (so small that it should be enlarged sharply) and cells:
    per run None, or its reconstruction (data URI), loss_norm and loss_pixel.
    """
    by_run = [{image.key: image for image in run.reconstructions} for run in runs]
    first = next((images for images in by_run if images), {})
    rows = []
    for key, image in list(first.items())[:limit]:
        with Image.open(image.original) as opened:
            pixelated = max(opened.size) < 96
        cells = [
            own
            and {
                "reconstruction": _data_uri(own.reconstruction),
                "loss_norm": own.loss_norm,
                "loss_pixel": own.loss_pixel,
            }
            for own in (images.get(key) for images in by_run)
        ]
        tiles = {"original": _data_uri(image.original), "masked": _data_uri(image.masked)}
        rows.append({"key": key, "pixelated": pixelated, "cells": cells, **tiles})
    return rows


def _final(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


def _best(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.min()) if len(finite) else math.nan


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _curve_rows(label: str, columns: Columns) -> list[Row]:
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = ({"run": label} | dict(zip(columns, row, strict=True)) for row in values)
    return [row | {key: int(row[key]) for key in ("step", "samples")} for row in rows]


def _reconstruction_rows(label: str, run: Run) -> list[Row]:
    return [
        {"run": label, "step": run.reconstructions_step, "key": image.key}
        | {"loss_norm": image.loss_norm, "loss_pixel": image.loss_pixel}
        for image in run.reconstructions
    ]


def _title(comparison: Comparison) -> str:
    baseline, *others = (arm.label for arm in comparison.arms)
    if not others:
        return baseline
    return f"{', '.join(others) if len(others) <= 2 else f'{len(others)} alternatives'} against {baseline}"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _render(comparison: Comparison, tables: Tables, figures: dict[str, Plot], title: str | None) -> dict[str, str]:
    content = {
        "title": title or _title(comparison),
        "comparison": comparison,
        "verdict": verdict(comparison),
        "caveats": caveats(comparison),
        "tables": tables,
        "figures": figures,
        "gallery": gallery(comparison.runs),
        "series": [comparison.arm_of(run) % len(PALETTE) for run in range(len(comparison.runs))],
        "spaces": SPACES,
    }
    return render({"summary.md": "summary.md", "index.html": "report.html"}, content)
