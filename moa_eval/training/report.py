"""Run folders -> one section of a page: verdict, tables, charts and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moa_eval.page.writing import Row, Section, Series
from moa_eval.training import experts, figures
from moa_eval.training.comparison import Comparison
from moa_eval.training.grouping import compare
from moa_eval.training.mixing_maps import mixing_content
from moa_eval.training.reading import find_runs, read_run
from moa_eval.training.runs import Run
from moa_eval.training.tables import make_tables
from moa_eval.training.verdict import caveats, verdict

SHOWN_IMAGES = 12
"""Number of held-out images on the page; tables/reconstructions.csv has all of them."""

_PIXELATED = 96  # side below which the page enlarges images without smoothing


def training_section(
    folders: Sequence[str | Path],
    *,
    slug: str = "training",
    title: str | None = None,
    strict: bool = False,
    baseline: str | Sequence[str] = (),
) -> Section:
    """Compare run folders and folders of run folders (sweeps); see `grouping.compare` for `baseline`.

    `slug` names the section in file names and ids; the default title has the names of the methods. With `strict`, runs
    that differ in data, masks, batch or budget are an error.

    Raises:
        DataError: A run folder is unusable, or the runs must not be compared.
        ConfigError: No method matches `baseline`.
    """
    paths = [path for folder in folders for path in find_runs(folder)]
    comparison = compare([read_run(path) for path in paths], strict=strict, baseline=baseline)
    return Section(
        slug=slug,
        title=title or _title(comparison),
        template="training",
        content=_content(comparison),
        tables=make_tables(comparison),
        charts=figures.draw_all(comparison),
        verdict=verdict(comparison),
        caveats=caveats(comparison),
        series=[
            Series(run.label, method.label, method.index, run in comparison.shown)
            for method in comparison.methods
            for run in method.runs
        ],
    )


def gallery(runs: Sequence[Run], limit: int = SHOWN_IMAGES) -> list[Row]:
    """Return the held-out images of the first run that has any, with each run's reconstruction of the same key.

    A row has key, original and masked (data URIs), pixelated (small enough to be enlarged without smoothing) and
    cells: per run its index as "run", and reconstruction (data URI), loss_norm, loss_pixel and step, None if missing.
    """
    recorded = {run: {image.key: image for image in run.reconstructions} for run in runs}
    first = next((images for images in recorded.values() if images), {})
    rows = []
    for key, image in [*first.items()][:limit]:
        with Image.open(image.original) as opened:
            pixelated = max(opened.size) < _PIXELATED
        cells = []
        for run, images in recorded.items():
            own = images.get(key)
            cells.append(
                {
                    "run": run.index,
                    "reconstruction": own and _data_uri(own.reconstruction),
                    "loss_norm": own and own.loss_norm,
                    "loss_pixel": own and own.loss_pixel,
                    "step": run.reconstructions_step,
                }
            )
        tiles = {"original": _data_uri(image.original), "masked": _data_uri(image.masked)}
        rows.append({"key": key, "pixelated": pixelated, "cells": cells, **tiles})
    return rows


def _content(comparison: Comparison) -> dict[str, Any]:
    shown, baseline = [method.shown_run for method in comparison.methods], comparison.baseline
    return {
        "comparison": comparison,
        "kind": comparison.kind,
        "spaces": comparison.kind.losses,
        "shown_runs": shown,
        "gallery": gallery(shown),
        "baseline": f"{baseline.name} of the same size" if comparison.has_sizes else baseline.label,
        "mixing": mixing_content(comparison),
        "experts": [
            {"run": run.index, "label": run.label, "sentence": experts.sentence(run.label, run.experts)}
            for run in shown
            if run.experts
        ],
    }


def _title(comparison: Comparison) -> str:
    names = [method.name if comparison.has_sizes else method.label for method in comparison.methods]
    baseline, *others = dict.fromkeys(names)
    if not others:
        return baseline
    return f"{' and '.join(others) if len(others) <= 2 else f'{len(others)} alternatives'} against {baseline}"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
