"""Choice of the checkpoint that a session starts from: the run's newest valid one, or another run's (`start_from`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moa_train import checkpoint
from moa_train.checkpoint import DamagedCheckpoint
from moa_train.config import START_FROM_MUTABLE_KEYS, RunConfig, as_tree
from moa_train.errors import ConfigError, DataError
from moa_train.reading import differing_keys
from moa_train.run_folder import RunFolder
from moa_train.schedule import Plan


class Start(NamedTuple):
    """Start of a session.

    Attributes:
        checkpoint: Checkpoint to load; None starts with new weights.
        own: Whether it is one of the run's own checkpoints.
        finished: Whether the run is already finished.
        warnings: Messages for the user.
    """

    checkpoint: Path | None
    own: bool
    finished: bool
    warnings: list[str]


def find_start(config: RunConfig, plan: Plan, identity: Mapping[str, Any], mutable_keys: frozenset[str]) -> Start:
    """Return the start of a session of the run; called on the main process with the run folder locked.

    `identity` has checksums of the task's data; `mutable_keys` may differ from the run's earlier sessions.

    Raises:
        ConfigError: Config or schedule do not fit the run or the checkpoint.
        DataError: All checkpoints of the run are lost or damaged, or the data have changed.
    """
    folder = RunFolder(config.folder)
    changed = folder.check(as_tree(config), config.resume, mutable_keys)
    newest, damaged = checkpoint.newest_valid(folder.checkpoints)
    warnings = [f"skipped a damaged checkpoint: {message}" for message in damaged]
    warnings += [f"continuing with another value of {message}" for message in changed]
    finished = folder.finished_steps() == plan.total_steps
    if newest is None and not finished and config.resume != "force":
        _require_checkpoint(folder, damaged, config.checkpoint.interval)
    source = newest or _other_run(config, plan, mutable_keys)
    if source is not None:
        warnings += _check_state(source, config, plan, identity)
    return Start(source, newest is not None, finished, warnings)


def _require_checkpoint(folder: RunFolder, damaged: list[str], interval: int) -> None:
    """Raise DataError if a run without a usable checkpoint must have had one.

    Starting again at step 0 would drop its rows and the damaged checkpoints. The first checkpoint is complete before
    the second one is begun.
    """
    reached = max((row["step"] for row in folder.rows()), default=0)
    if damaged or reached > 2 * interval:
        reasons = f" ({'; '.join(damaged)})" if damaged else ""
        raise DataError(
            f"{folder.path} holds {reached:,} steps of a run, but no usable checkpoint{reasons}; restore one in "
            f"{folder.checkpoints}, choose another name, or start again at step 0 with --resume force"
        )


def _check_state(path: Path, config: RunConfig, plan: Plan, identity: Mapping[str, Any]) -> list[str]:
    """Check that a checkpoint fits the data, the optimizer and the length of the run; return warnings."""
    state = checkpoint.read_state(path)
    known = state["identity"]
    changed = sorted(key for key in known.keys() & identity.keys() if known[key] != identity[key])
    if changed and config.resume != "force":
        raise DataError(
            f"{path} was trained on other data: {', '.join(changed)} changed since; restore the data, choose another "
            "name, or continue with --resume force"
        )
    algorithm = state["config"]["optim"]["algorithm"]
    if algorithm != config.optim.algorithm:
        raise ConfigError(
            f"optim.algorithm is {config.optim.algorithm!r}, but {path} holds the state of {algorithm!r}; restore it, "
            "or choose another name"
        )
    if state["step"] > plan.total_steps:
        raise ConfigError(f"{path} is past the end of this config, step {plan.total_steps}; use a longer schedule")
    then, now = state["global_batch"], plan.global_batch
    if then == now:
        return []
    return [f"schedule.batch_size was {then} and is {now} now: some samples are repeated or left out"]


def _other_run(config: RunConfig, plan: Plan, mutable_keys: frozenset[str]) -> Path | None:
    """Return the checkpoint of another run that `start_from` names, after checking that it fits."""
    if config.start_from is None:
        return None
    path = Path(config.start_from)
    try:
        state = checkpoint.verify(path)
    except DamagedCheckpoint as error:
        raise DataError(f"start_from cannot be used: {error}") from error
    if config.resume == "force":
        return path
    allowed = mutable_keys | START_FROM_MUTABLE_KEYS
    different = differing_keys(state["config"], as_tree(config), mutable_keys=allowed)
    if different:
        raise ConfigError(
            f"start_from {path} has another config ({'; '.join(different)}); restore these values, or use --resume "
            "force"
        )
    _check_phase(path, state, plan, config.schedule.decay_fraction)
    return path


def _check_phase(path: Path, state: Mapping[str, Any], plan: Plan, decay_fraction: float) -> None:
    """Raise ConfigError unless the learning rate is at its peak at this step, in the other run and in this one."""
    step = state["step"]
    if not state["stable"] or step < plan.warmup_steps:
        raise ConfigError(f"start_from {path} is from the warm-up or the decay; use a checkpoint between them")
    if plan.is_decaying(step):
        steps = math.ceil(step / (1 - decay_fraction)) if decay_fraction < 1 else 0
        fix = f"train for {steps:,} steps or more" if steps else "set schedule.decay_fraction below 1"
        raise ConfigError(
            f"start_from {path} is from step {step:,}, but this schedule decays from step "
            f"{plan.total_steps - plan.decay_steps:,}; {fix}"
        )
