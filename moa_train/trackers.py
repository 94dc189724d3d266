"""Experiment trackers (TensorBoard, W&B, ...) through accelerate; all sessions of a run are one run of a tracker."""

from __future__ import annotations

import sys
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
    name, of_swanlab = tree["name"], {"id": run_id[:21], "logdir": str(folder / "swanlog")}  # the required length
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder)},
        "swanlab": {"experiment_name": name, "resume": "allow", **of_swanlab},
        "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},  # identifies a run by its name
        "comet_ml": {"experiment_key": run_id, "mode": "get_or_create"},
        "dvclive": {"dir": str(folder / "dvclive"), "dvcyaml": str(folder / "dvc.yaml"), "resume": True},
    }
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log the numbers of a metrics row as e.g. train/loss at its step."""
    values = {f"{row['kind']}/{key}": v for key, v in row.items() if isinstance(v, int | float) and key != "step"}
    accelerator.log(values, step=row["step"])


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers and the process group."""
    try:
        accelerator.end_training()
    except OSError as error:
        print(f"warning: a tracker could not write its last rows: {error}", file=sys.stderr)
