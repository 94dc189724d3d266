"""The checkpoint that a session begins with: the run's newest valid one, or another run's (`start_from`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from moa_train import checkpoint
from moa_train.checkpoint import DamagedCheckpoint
from moa_train.config import START_FROM_MUTABLE_KEYS, RunConfig, as_tree, differing_keys
from moa_train.run_folder import RunFolder
from moa_train.schedule import Plan


class Origin(NamedTuple):
    """What `choose` found.

    newest: the run's newest valid checkpoint. source: that one, or another run's to begin with. damaged: a message
    for each of the run's checkpoints that were passed over.
    """

    newest: Path | None
    source: Path | None
    damaged: list[str]


def choose(config: RunConfig, plan: Plan, accelerator: Accelerator, mutable_keys: frozenset[str]) -> Origin:
    """Look for the checkpoint to begin with; to be called by all processes.

    The main process looks, and all take what it found: a file system may not show them the same.

    Raises:
        ValueError: the run is without a checkpoint that it must have had, `start_from` names one that is damaged or
            does not fit (`mutable_keys` keys may differ), or this process does not see what the main one found.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        newest, damaged = checkpoint.newest_valid(RunFolder(config.folder).checkpoints)
        if newest is None and config.resume != "force":
            _check_nothing_lost(RunFolder(config.folder), damaged, plan.total_steps, config.checkpoint.interval)
        found = [(newest, newest or _start(config, plan, mutable_keys), damaged)]
    origin = Origin(*broadcast_object_list(found)[0])
    if origin.source is not None and not origin.source.exists():
        raise ValueError(f"{origin.source} is there for the main process, but not here: all must see the same folder")
    return origin


def _check_nothing_lost(folder: RunFolder, damaged: list[str], total_steps: int, save_every: int) -> None:
    """Raise ValueError if an unfinished run without a usable checkpoint got further than a crash can undo.

    To begin it again at step 0 would drop its rows, and the damaged checkpoints that somebody may want to mend.
    """
    reached = max((row["step"] for row in folder.rows()), default=0)
    if folder.finished_steps() == total_steps or (not damaged and reached <= save_every):
        return
    listed = "".join(f"\n  {message}" for message in damaged)
    raise ValueError(
        f"{folder.path} holds {reached:,} steps of a run, but no checkpoint that can be used.{listed}\n"
        f"Bring one back into {folder.checkpoints}, choose another name, or begin again at step 0, all that is there "
        "dropped, with --resume force."
    )


def check_fit(path: Path, config: RunConfig, identity: Mapping[str, Any] | None) -> None:
    """Raise ValueError if the checkpoint holds another algorithm's state, or was trained on something else.

    `identity` is what the task tells of its data (`task.Identified`).
    """
    state = checkpoint.read_state(path)
    known, own = state.get("identity") or {}, identity or {}
    changed = sorted(key for key in known.keys() & own.keys() if known[key] != own[key])
    if changed and config.resume != "force":
        raise ValueError(
            f"{path} was trained on other data: {', '.join(changed)} changed since. Bring back what it was, "
            "begin a new run, or continue all the same with --resume force"
        )
    saved = state.get("config", {}).get("optim", {}).get("algorithm", "adamw")
    if saved != config.optim.algorithm:
        raise ValueError(
            f"optim.algorithm is {config.optim.algorithm!r}, but {path} holds the optimizer state of "
            f"{saved!r}; go back to it, or begin a new run"
        )


def _start(config: RunConfig, plan: Plan, mutable_keys: frozenset[str]) -> Path | None:
    """Return the other run's checkpoint to begin with, if the configuration names one and it fits."""
    if config.start_from is None:
        return None
    path = Path(config.start_from)
    try:
        state = checkpoint.verify(path)
    except DamagedCheckpoint as error:
        raise ValueError(f"start_from cannot be used: {error}") from error
    if config.resume != "force":
        _check_same_run(path, state, config, mutable_keys)
        _check_phase(path, state, plan, config.schedule.decay_fraction)
    return path


def _check_same_run(path: Path, state: Mapping[str, Any], config: RunConfig, mutable_keys: frozenset[str]) -> None:
    """Raise ValueError unless this run is the one that wrote the checkpoint, but for how and when it ends."""
    different = differing_keys(
        state.get("config", {}), as_tree(config), mutable_keys=mutable_keys | START_FROM_MUTABLE_KEYS
    )
    if different:
        listed = "\n  ".join(different)
        raise ValueError(
            f"start_from {path} is of a run with another configuration:\n  {listed}\n"
            "Go back to these values, or begin with it all the same with --resume force."
        )


def _check_phase(path: Path, state: Mapping[str, Any], plan: Plan, decay_fraction: float) -> None:
    """Raise ValueError unless the checkpoint was written at the peak rate, and its step has it here too."""
    step = state["step"]
    if not state.get("stable", True) or step < plan.warmup_steps:
        raise ValueError(f"start_from {path}: its rate still rose, or fell already; take another checkpoint")
    if plan.is_decaying(step):
        enough = math.ceil(step / (1 - decay_fraction)) if decay_fraction < 1 else 0
        longer = f"{enough:,} steps or more" if enough else "a decay_fraction below 1"
        raise ValueError(
            f"start_from {path} is of step {step:,}, but this schedule's rate falls from step "
            f"{plan.total_steps - plan.decay_steps:,} on; it takes {longer}"
        )
