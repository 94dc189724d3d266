"""How a run's tokens are routed: what its folder `experts/` holds, and which experts get too little or too much.

An expert's load is its share of the layer's assignments; an even share is 1/E for E experts. An expert below a tenth
of an even share is called dead, one above twice an even share overloaded: twice is the capacity beyond which GShard
drops tokens (arXiv:2006.16668, capacity factor 2).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moa_eval.page.formatting import enumerate_words, grouped
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison
from moa_eval.training.reading import broken, read_json

DEAD, OVERLOADED = 0.1, 2.0  # times an even share
_NAMED = 4  # experts named in a sentence; tables/expert_load.csv has all
_REMEDY = "delete the folder or leave this run out"

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
    """One layer's routing at one step.

    Attributes:
        layer: Such as "model.0".
        relative: Load of each of E experts as a multiple of an even share, (E,); 1 is even.
        entropy: Mean entropy of the router's distribution over a token's experts, as a part of the largest, log E.
        balance_loss: The load-balancing loss; 1 is perfect balance.
        assignments, dropped: Tokens times experts a token, and how many of these were dropped.
    """

    layer: str
    relative: Values
    entropy: float
    balance_loss: float
    assignments: int
    dropped: int

    @property
    def dead(self) -> list[int]:
        """The experts below a tenth of an even share."""
        return np.flatnonzero(self.relative < DEAD).tolist()

    @property
    def overloaded(self) -> list[int]:
        """The experts above twice an even share."""
        return np.flatnonzero(self.relative > OVERLOADED).tolist()


@dataclass(frozen=True)
class Experts:
    """What a run recorded of its routing: its layers by training step, in rising order."""

    steps: dict[int, tuple[Routing, ...]]

    @property
    def last(self) -> tuple[Routing, ...]:
        """The layers at the last recorded step."""
        return self.steps[max(self.steps)]


def read_all(comparison: Comparison) -> dict[int, Experts]:
    """What the runs recorded, by their position; runs without experts are left out.

    Raises:
        RunFolderError: A file is broken.
    """
    read = {index: read_experts(run.folder / "experts") for index, run in enumerate(comparison.runs)}
    return {index: experts for index, experts in read.items() if experts is not None}


def read_experts(folder: Path) -> Experts | None:
    """Read and check a run's folder `experts/`; None if it has none.

    Raises:
        RunFolderError: A file is broken.
    """
    read = sorted((_read_step(path) for path in folder.glob("step_*.json")), key=lambda entry: entry[0])
    steps = {step: layers for step, layers in read if layers}
    return Experts(steps) if steps else None


def sentence(label: str, experts: Experts) -> str:
    """What a run's routing comes to at its last recorded step."""
    layers = experts.last
    total = sum(len(layer.relative) for layer in layers)
    low, high = (pick(layer.entropy for layer in layers) for pick in (min, max))
    dropped, assignments = (sum(getattr(layer, key) for layer in layers) for key in ("dropped", "assignments"))
    lost = (
        f"{grouped(dropped)} of {grouped(assignments)} assignments were dropped" if dropped else "no token was dropped"
    )
    return (
        f"{label}: of {total} experts in {len(layers)} {'layer' if len(layers) == 1 else 'layers'} "
        f"{_named(layers, 'dead', 'below a tenth of an even share')}, "
        f"{_named(layers, 'overloaded', 'above twice an even share')}; "
        f"router entropy {low:.2f} to {high:.2f} of the largest; {lost}."
    )


def expert_rows(comparison: Comparison, experts: Mapping[int, Experts]) -> list[Row]:
    """A row a run, recorded step and layer: how even its routing is; loads are multiples of an even share."""
    return [
        {
            "run": comparison.labels[run],
            "step": step,
            "layer": layer.layer,
            "experts": len(layer.relative),
            "lowest_load": float(layer.relative.min()),
            "highest_load": float(layer.relative.max()),
            "dead": len(layer.dead),
            "overloaded": len(layer.overloaded),
            "entropy": layer.entropy,
            "balance_loss": layer.balance_loss,
            "assignments": layer.assignments,
            "dropped": layer.dropped,
        }
        for run, own in experts.items()
        for step, layers in own.steps.items()
        for layer in layers
    ]


def load_rows(comparison: Comparison, experts: Mapping[int, Experts]) -> list[Row]:
    """A row a run, layer and expert at the last recorded step: its load as a multiple of an even share."""
    return [
        {"run": comparison.labels[run], "layer": layer.layer, "expert": expert, "load": load}
        for run, own in experts.items()
        for layer in own.last
        for expert, load in enumerate(layer.relative.tolist())
    ]


def _named(layers: Sequence[Routing], what: str, limit: str) -> str:
    named = [f"{layer.layer} expert {expert}" for layer in layers for expert in getattr(layer, what)]
    if not named:
        return f"none is {what} ({limit})"
    more = [f"{len(named) - _NAMED} more"] if len(named) > _NAMED else []
    verb = "is" if len(named) == 1 else "are"
    return f"{len(named)} {verb} {what} ({limit}: {enumerate_words(named[:_NAMED] + more)})"


def _read_step(path: Path) -> tuple[int, tuple[Routing, ...]]:
    content = read_json(path)
    try:
        routed = [entry for entry in content["layers"] if len(entry["load"]) > 1]  # one expert has no choice
        return int(content["step"]), tuple(map(_routing, routed))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise broken(path, f"not a record of experts ({error!r})", _REMEDY) from None


def _routing(entry: Mapping[str, Any]) -> Routing:
    load = np.array(entry["load"], dtype=np.float64)
    if load.ndim != 1 or len(load) < 2 or not math.isclose(load.sum(), 1, abs_tol=1e-3):
        raise ValueError(f"load of {entry['layer']} is no list of two or more shares with the sum 1")
    return Routing(
        layer=str(entry["layer"]),
        relative=load * len(load),
        entropy=float(entry["entropy"]) / float(entry["max_entropy"]),
        balance_loss=float(entry["balance_loss"]),
        assignments=int(entry["assignments"]),
        dropped=int(entry["dropped"]),
    )
