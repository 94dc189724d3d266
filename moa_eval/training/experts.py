"""Recorded expert routing of a run: its folder `experts/`.

The load of an expert is its share of the layer's assignments; an even share is 1/E for E experts. An expert below a
tenth of an even share is called dead. An expert above twice an even share is called overloaded: GShard drops tokens
beyond that capacity (arXiv:2006.16668, capacity factor 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moa_eval.page.formatting import first_of, grouped
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


@dataclass(frozen=True)
class Routing:
    """Routing of one layer at one step.

    Attributes:
        layer: Name such as "model.0".
        relative: Load of each of E experts as a multiple of an even share, (E,).
        entropy: Mean entropy of the router's distribution over experts, as a fraction of its maximum log E.
        balance_loss: Load-balancing loss; 1 is perfect balance.
        assignments, dropped: Number of tokens times experts per token, and how many of these were dropped.
    """

    layer: str
    relative: NDArray[np.float64]
    entropy: float
    balance_loss: float
    assignments: int
    dropped: int

    @property
    def dead(self) -> list[str]:
        """Names of the experts below a tenth of an even share."""
        return self._names(self.relative < DEAD)

    @property
    def overloaded(self) -> list[str]:
        """Names of the experts above twice an even share."""
        return self._names(self.relative > OVERLOADED)

    def _names(self, chosen: NDArray[np.bool_]) -> list[str]:
        return [f"{self.layer} expert {expert}" for expert in np.flatnonzero(chosen)]


@dataclass(frozen=True)
class Experts:
    """Recorded routing of a run: layers by training step, in rising order."""

    steps: dict[int, tuple[Routing, ...]]

    @property
    def last(self) -> tuple[Routing, ...]:
        """The layers at the last recorded step."""
        return self.steps[max(self.steps)]


def read_experts(folder: Path) -> Experts | None:
    """Read and check the folder `experts/` of a run; return None if it has no record.

    Raises:
        DataError: A file is unusable.
    """
    records = sorted(map(_read_step, folder.glob("step_*.json")), key=lambda record: record[0])
    steps = {step: layers for step, layers in records if layers}
    return Experts(steps) if steps else None


def sentence(label: str, experts: Experts) -> str:
    """Return a sentence about a run's routing at its last recorded step."""
    layers = experts.last
    dead = [name for layer in layers for name in layer.dead]
    overloaded = [name for layer in layers for name in layer.overloaded]
    entropies = [layer.entropy for layer in layers]
    dropped, assignments = (sum(getattr(layer, key) for layer in layers) for key in ("dropped", "assignments"))
    return (
        f"{label}, {sum(len(layer.relative) for layer in layers)} experts in {len(layers)} layers: "
        f"dead (below a tenth of an even share): {first_of(dead) or 'none'}; "
        f"overloaded (above twice an even share): {first_of(overloaded) or 'none'}; "
        f"router entropy {min(entropies):.2f} to {max(entropies):.2f} of the maximum; "
        f"dropped assignments: {f'{grouped(dropped)} of {grouped(assignments)}' if dropped else 'none'}."
    )


def _read_step(path: Path) -> tuple[int, tuple[Routing, ...]]:
    content = read_json(path, _STEP, _REMEDY)
    routed = [entry for entry in content["layers"] if len(entry["load"]) > 1]  # a single expert is not routed
    return content["step"], tuple(_routing(path, entry) for entry in routed)


def _routing(path: Path, entry: Mapping[str, Any]) -> Routing:
    load = np.array(entry["load"], dtype=np.float64)
    if not math.isclose(load.sum(), 1, abs_tol=1e-3):
        raise bad_file(path, f"the load of {entry['layer']} has the sum {load.sum():g}, expected 1", _REMEDY)
    if not entry["max_entropy"] > 0:
        raise bad_file(path, f"max_entropy of {entry['layer']} is {entry['max_entropy']}, expected > 0", _REMEDY)
    return Routing(
        layer=entry["layer"],
        relative=load * len(load),
        entropy=entry["entropy"] / entry["max_entropy"],
        balance_loss=entry["balance_loss"],
        assignments=entry["assignments"],
        dropped=entry["dropped"],
    )
