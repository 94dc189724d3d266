"""Experiment trackers through accelerate; in TensorBoard and W&B all sessions of a run are one run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from moa_train.atomic_io import write_text
from moa_train.errors import ConfigError
from moa_train.reading import flatten

PROJECT = "mixture-of-activations"
"""Project name in trackers."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know or whose package is not installed."""
    available = [str(name) for name in get_available_trackers()]
    known = sorted(tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL)
    for name in names:
        if name not in known:
            raise ConfigError(f"loop.trackers contains {name!r}; it must be among {', '.join(known)}, or []")
        if name not in available:
            raise ConfigError(f"loop.trackers contains {name!r}, which is not installed; pip install {name}, or use []")


def start_trackers(accelerator: Accelerator, tree: dict[str, Any], folder: Path, *, step: int) -> None:
    """Start the trackers on the main process with the resolved config `tree`.

    `folder` gets their files and the run's id for them. Trackers that can drop rows drop those after `step`, which an
    earlier session has written.
    """
    values = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(tree).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "id").exists():
        write_text(folder / "id", uuid.uuid4().hex + "\n")
    run_id = (folder / "id").read_text(encoding="utf-8").strip()
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": tree["name"], "id": run_id, "resume": "allow", "dir": str(folder)},
    }
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log the numbers of a metrics row as e.g. train/loss at its step."""
    values = {f"{row['kind']}/{key}": v for key, v in row.items() if isinstance(v, int | float) and key != "step"}
    accelerator.log(values, step=row["step"])
