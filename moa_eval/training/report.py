"""Run folders -> one section of a page: verdict, tables, charts and pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moa_eval.page.writing import Row, Section, Series
from moa_eval.training import experts, figures, mixing, scaling
from moa_eval.training.comparison import Comparison, compare
from moa_eval.training.reading import find_runs, read_run
from moa_eval.training.runs import Run
from moa_eval.training.tables import make_tables
from moa_eval.training.verdict import caveats, verdict

SHOWN_IMAGES = 12  # on the page; reconstructions.csv has them all


def training_section(
    folders: Sequence[str | Path],
    *,
    slug: str = "training",
    title: str | None = None,
    strict: bool = False,
    baseline: str | Sequence[str] | None = None,
) -> Section:
    """Compare run folders, the first of which belongs to the baseline unless another is named.

    Args:
        folders: Run folders, and folders that hold run folders (a sweep's).
        slug: Name of the section in file names and ids.
        title: Heading (default: the contenders' names).
        strict: Refuse runs that differ in data, masks, batch or budget.
        baseline: A contender's label, an FFN, or a run's name or folder; of several the first that is there.

    Raises:
        RunFolderError: A run folder is missing or broken.
        NotComparableError: A folder is given twice; nothing is called `baseline`; or `strict`, and the runs are not
            comparable.
    """
    paths = [path for folder in folders for path in find_runs(folder)]
    comparison = compare([read_run(path) for path in paths], strict=strict, baseline=baseline)
    mixings, routings = mixing.read_all(comparison), experts.read_all(comparison)
    lines = scaling.fit_lines(comparison)
    return Section(
        slug=slug,
        title=title or _title(comparison),
        template="training",
        content=_content(comparison, mixings, routings, lines),
        tables=make_tables(comparison, mixings, routings, lines),
        charts=figures.draw_all(comparison, mixings, routings, lines),
        verdict=verdict(comparison),
        caveats=caveats(comparison),
        series=[
            Series(
                label,
                comparison.contenders[comparison.contender_of(run)].label,
                comparison.contender_of(run),
                run in comparison.shown,
            )
            for run, label in enumerate(comparison.labels)
        ],
    )


def gallery(runs: Sequence[Run], shown: Sequence[int], limit: int = SHOWN_IMAGES) -> list[Row]:
    """The held-out images of the first shown run that has any, with every shown run's reconstruction of the same key.

    A row holds key, original, masked (data URIs), pixelated (so small that it should be enlarged sharply) and cells:
    per shown run its position "run", and reconstruction (data URI), loss_norm, loss_pixel and step, None if missing.
    """
    by_run = {run: {image.key: image for image in runs[run].reconstructions} for run in shown}
    first = next((images for images in by_run.values() if images), {})
    rows = []
    for key, image in list(first.items())[:limit]:
        with Image.open(image.original) as opened:
            pixelated = max(opened.size) < 96
        cells = []
        for run, images in by_run.items():
            own = images.get(key)
            cells.append(
                {
                    "run": run,
                    "reconstruction": own and _data_uri(own.reconstruction),
                    "loss_norm": own and own.loss_norm,
                    "loss_pixel": own and own.loss_pixel,
                    "step": runs[run].reconstructions_step,
                }
            )
        tiles = {"original": _data_uri(image.original), "masked": _data_uri(image.masked)}
        rows.append({"key": key, "pixelated": pixelated, "cells": cells, **tiles})
    return rows


def _content(
    comparison: Comparison,
    mixings: dict[int, mixing.Mixing],
    routings: dict[int, experts.Experts],
    lines: Sequence[scaling.Line],
) -> dict[str, Any]:
    best = [comparison.best_run(contender) for contender in range(len(comparison.contenders))]
    return {
        "comparison": comparison,
        "kind": comparison.kind,
        "spaces": comparison.kind.losses,
        "gallery_runs": best,
        "gallery": gallery(comparison.runs, best),
        "baseline": _baseline(comparison),
        "scaling": scaling.sentences(lines),
        "mixing": mixing.sections(comparison, mixings),
        "experts": [
            {"run": run, "label": comparison.labels[run], "sentence": experts.sentence(comparison.labels[run], own)}
            for run, own in comparison.of_best_runs(routings).items()
        ],
        "commands": [
            {
                "run": index,
                "label": label,
                "folder": str(run.folder),
                "command": run.environment.get("command") or "command not recorded",
            }
            for index, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True))
        ],
    }


def _baseline(comparison: Comparison) -> str:
    """What the page calls the baseline: with several, the FFN they share."""
    first = comparison.contenders[0]
    several = sum(contender.baseline is None for contender in comparison.contenders) > 1
    return f"{first.ffn} of the same size" if several else first.label


def _title(comparison: Comparison) -> str:
    several = any(contender.baseline is None for contender in comparison.contenders[1:])
    names = dict.fromkeys(contender.ffn if several else contender.label for contender in comparison.contenders)
    baseline, *others = names
    if not others:
        return baseline
    return f"{' and '.join(others) if len(others) <= 2 else f'{len(others)} alternatives'} against {baseline}"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
