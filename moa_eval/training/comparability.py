"""Reasons why runs are not comparable: differing data, masks, batch, budget or held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moa_eval.page.formatting import grouped, show, spell
from moa_eval.training.comparison import Method
from moa_eval.training.configuration import BUDGETS, config_difference, role
from moa_eval.training.runs import Run


def incomparable_reasons(methods: Sequence[Method]) -> list[str]:
    """Return the reasons why the losses of these methods are not comparable, one line each.

    The schedule must match among the methods with one baseline, everything else among all runs.
    """
    sets = [[method for method in methods if method.reference is first] for first in methods if not first.baseline]
    runs = [run for method in methods for run in method.runs]
    reasons = [words for key, words in _key_mismatches(runs) if not key.startswith("schedule.")]
    for own in sets:
        members = [run for method in own for run in method.runs]
        reasons += [words for key, words in _key_mismatches(members) if key.startswith("schedule.")]
    return [*reasons, *(reason for own in sets for reason in _budget_mismatch(own)), *_image_mismatches(runs)]


def _key_mismatches(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    for key, values in config_difference([run.config for run in runs]).items():
        # A budget may be given in different units; what the runs have seen is compared as well.
        given = [value for value in values if value is not None] if key in BUDGETS else values
        if role(key, values) == "must match" and any(value != given[0] for value in given):
            yield key, f"{key}: {spell([run.label for run in runs], [show(value) for value in values])}"


def _budget_mismatch(methods: Sequence[Method]) -> Iterator[str]:
    """Compare what the best groups have seen; runs at other rates and further seeds may be unfinished."""
    compared = []
    for method in methods:
        furthest = max(run.seen for run in method.best_runs)
        compared += [run for run in method.best_runs if run.seen == furthest or run.status == "finished"]
    seen = {run.label: run.seen for run in compared if run.diverged_at is None}
    if len(set(seen.values())) > 1:
        yield f"{compared[0].kind.unit}s seen: {spell([*seen], [grouped(value) for value in seen.values()])}"


def _image_mismatches(runs: Sequence[Run]) -> Iterator[str]:
    """Compare the recorded pictures: whether a key stands for the same photograph and the same mask in all runs."""
    recorded = [run for run in runs if run.reconstructions]
    for run in recorded[1:]:
        first = {image.key: image for image in recorded[0].reconstructions}
        pairs = [(first[image.key], image) for image in run.reconstructions if image.key in first]
        # Different pixels also make a different masked picture: one reason is enough.
        for tile, what in (("original", "pixels"), ("masked", "mask")):
            keys = [own.key for own, other in pairs if not _same_picture(getattr(own, tile), getattr(other, tile))]
            if keys:
                which = f"{what} of {len(keys)} held-out images, such as {keys[0]}"
                yield f"{which}: {run.label} differs from {recorded[0].label}"
                break


def _same_picture(a: Path, b: Path) -> bool:
    with Image.open(a) as first, Image.open(b) as second:
        return np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB")))
