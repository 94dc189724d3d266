"""Recorded expert routing of a run: its folder `experts/`.

The load of an expert is its share of the layer's assignments, as a multiple of an even share. An expert below a tenth
of an even share is called dead. An expert above twice an even share is called overloaded: GShard drops tokens beyond
that capacity (arXiv:2006.16668, capacity factor 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moa_eval.page.formatting import grouped
from moa_eval.page.writing import Row
from moa_eval.training.files import bad_file, fields, list_of, read_json

DEAD, OVERLOADED = 0.1, 2.0
"""Limits as multiples of an even share."""

_REMEDY = "delete the folder or leave this run out"
_LAYER = fields(
    layer="string",
    load=list_of("number"),
    entropy="number",
    max_entropy="number",
    balance_loss="number",
    assignments="integer",
    dropped="integer",
)
_STEP = fields(step="integer", layers=list_of(_LAYER))


def read_experts(folder: Path) -> list[Row]:
    """Return a row per recorded step and layer with several experts, by step.

    `load` has a value per expert; `entropy` is a fraction of its maximum.

    Raises:
        DataError: A file is unusable.
    """
    rows = [row for path in folder.glob("step_*.json") for row in _read_step(path)]
    return sorted(rows, key=lambda row: row["step"])


def last_step(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the last recorded step."""
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def sentence(label: str, rows: Sequence[Row]) -> str:
    """Return a sentence about a run's routing at its last recorded step."""
    last = last_step(rows)
    total = {key: sum(row[key] for row in last) for key in ("experts", "dead", "overloaded", "dropped", "assignments")}
    entropies = [row["entropy"] for row in last]
    dropped = f"{grouped(total['dropped'])} of {grouped(total['assignments'])}" if total["dropped"] else "none"
    return (
        f"{label}, {total['experts']} experts in {len(last)} layers: "
        f"dead (below a tenth of an even share): {total['dead'] or 'none'}; "
        f"overloaded (above twice an even share): {total['overloaded'] or 'none'}; "
        f"router entropy {min(entropies):.2f} to {max(entropies):.2f} of the maximum; dropped assignments: {dropped}."
    )


def _read_step(path: Path) -> Iterator[Row]:
    content = read_json(path, _STEP, _REMEDY)
    for entry in content["layers"]:
        if len(entry["load"]) < 2:
            continue  # a single expert is not routed
        load = np.array(entry["load"], dtype=np.float64) * len(entry["load"])
        if not abs(load.mean() - 1) < 1e-3 or not entry["max_entropy"] > 0:
            raise bad_file(path, f"the load or max_entropy of {entry['layer']} is invalid", _REMEDY)
        yield {
            "step": content["step"],
            "layer": entry["layer"],
            "experts": len(load),
            "load": load.tolist(),
            "lowest_load": float(load.min()),
            "highest_load": float(load.max()),
            "dead": int((load < DEAD).sum()),
            "overloaded": int((load > OVERLOADED).sum()),
            "entropy": entry["entropy"] / entry["max_entropy"],
            **{key: entry[key] for key in ("balance_loss", "assignments", "dropped")},
        }
