"""Trackers of accelerate (TensorBoard, Weights & Biases, ...) by name; a missing one is an error, not silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from moa_train.config import flatten

PROJECT = "mixture-of-activations"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that accelerate does not know or whose package is not installed."""
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"loop.trackers names {name!r}; it must be among {known}, or [] for none")
        if name not in available:
            raise ValueError(
                f"loop.trackers names {name!r}, whose package is not installed: pip install {name}, "
                "or leave it out (--loop.trackers [])"
            )


def start_trackers(accelerator: Accelerator, tree: dict[str, Any], *, step: int) -> None:
    """Start the trackers with the configuration `tree`; rows after `step` from an earlier session are superseded."""
    values = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(tree).items()}
    options = {"tensorboard": {"purge_step": step + 1}, "wandb": {"name": tree["name"]}}
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log a metrics row's numbers as e.g. train/loss at its step."""
    values = {f"{row['kind']}/{key}": v for key, v in row.items() if isinstance(v, int | float) and key != "step"}
    accelerator.log(values, step=row["step"])
