"""Checkpoints: a folder of safetensors and JSON, complete or absent, checked before it is used; nothing is pickled.

checkpoints/step_00001000/model.safetensors         weights, by parameter name
                          optimizer.safetensors     optimizer tensors, "PARAMETER.SLOT"
                          generators.safetensors    random generators, "RANK.cpu" and "RANK.cuda"
                          state.json                step, seconds, config; size and sha256 of the files above
checkpoints/LAST                                    name of the folder written last, for people and scripts; a run
                                                    goes on from the newest folder that is whole
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moa_train.atomic_io import new_folder, sync_file, write_json, write_text
from moa_train.distributed import full, place_like
from moa_train.reading import read_json
from moa_train.spikes import RecentLoss

FILES = ("model.safetensors", "optimizer.safetensors", "generators.safetensors")

Generators = dict[str, torch.Tensor]
"""Names of random generators to their states, 1-D uint8 on the CPU."""

Snapshot = dict[str, dict[str, torch.Tensor]]
"""The tensors of each of `FILES`, on the CPU."""


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, cut short or changed; the message names the file."""


class NotSaved(Exception):
    """A checkpoint, or another file of the run, could not be written; the message names it. Others are as before."""


class NotTidied(Exception):
    """A checkpoint is there and whole, but LAST does not point at it, or others could not be dropped."""


class Unreadable(Exception):
    """A file cannot be read now, for a reason that says nothing about its content; the message names it."""


_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
"""Errors in reading that speak of the file. Others (a stale handle, no permission, too many files) may pass; EIO,
which a network may cause too, is believed once it stays."""

_PAUSES_S = (1, 4)
"""Before a checkpoint that could not be read is tried again."""


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, generators: Generators, *, main: bool = True
) -> Snapshot:
    """Copy what a checkpoint holds to the CPU, so that training can go on while it is written.

    What is in shards is copied whole, which takes all processes together; those that are not the `main` one drop what
    they gathered, and their snapshot is empty. `model` is the bare module (no DDP wrapper).
    """
    kept = model.state_dict().keys()
    named = chain(model.named_parameters(), model.named_buffers())  # tied ones once
    weights = {name: tensor for name, tensor in named if name in kept}
    parts = zip(FILES, (weights, _optimizer_tensors(model, optimizer), generators), strict=True)
    taken: Snapshot = {file: {} for file in FILES}
    for file, name, tensor in ((file, name, tensor) for file, part in parts for name, tensor in part.items()):
        whole = full(tensor.detach())
        if main:
            taken[file][name] = whole.to("cpu", copy=True).contiguous()
    return taken


def save(
    folder: Path,
    state: dict[str, Any],
    tensors: Snapshot,
    *,
    keep: int,
    keep_every: int | None = None,
    beside: Sequence[Path] = (),
    superseded: Path | None = None,
) -> Path:
    """Write `folder`/step_XXXXXXXX, then point LAST at it, then drop others.

    Kept are the newest `keep` up to this one, and those whose step is a multiple of `keep_every`.

    Args:
        folder: Of the checkpoints.
        state: JSON with an int "step".
        tensors: Of `snapshot`.
        keep: As above.
        keep_every: As above.
        beside: Files that the checkpoint counts on, such as rows: forced to the disk before it can be seen.
        superseded: A checkpoint that is dropped and does not count.

    Raises:
        NotSaved: the disk is full, or cannot be written to, or `state` is no JSON.
        NotTidied: the checkpoint is there, but what comes after it failed.
    """
    final = folder / f"step_{state['step']:08d}"
    try:
        remove_leftovers(folder)
        for path in beside:
            if path.exists():
                sync_file(path)
        with new_folder(final) as temporary:
            for name in FILES:
                save_file(tensors[name], temporary / name)
            sums = {name: _checksum(temporary / name) for name in FILES}
            write_json(temporary / "state.json", {**state, "files": sums})
    except (OSError, ValueError, SafetensorError) as error:
        raise NotSaved(f"{final} could not be written: {error}") from error
    try:
        write_text(folder / "LAST", final.name + "\n")
        for old in _superfluous(final, keep, keep_every, superseded):
            old.rename(old.with_name(f".{old.name}.old"))  # gone at once: what is visible is whole
        remove_leftovers(folder)
    except OSError as error:
        raise NotTidied(
            f"{final} is saved, but LAST does not say so, or older ones are still there: {error}"
        ) from error
    return final


def _superfluous(newest: Path, keep: int, keep_every: int | None, superseded: Path | None) -> Iterator[Path]:
    """Yield the checkpoints to drop once `newest` is there.

    Later ones are damaged, or they were when this session began: it goes another way since.
    """
    earlier = []
    for step, path in sorted(_steps(newest.parent), reverse=True):
        if path.name > newest.name or (path == superseded and path != newest):
            yield path
        else:
            earlier.append((step, path))
    yield from (path for step, path in earlier[keep:] if keep_every is None or step % keep_every)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed or failed saves left behind, and what was dropped."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


class Saver:
    """Saves checkpoints one after another in a thread of its own; see `save`.

    Args:
        folder: Of the checkpoints.
        keep: As `save` has it.
        keep_every: Likewise.
        beside: Likewise.

    Attributes:
        saved_step: Step of the newest checkpoint that is known to be whole, -1 if there is none.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None, beside: Sequence[Path] = ()) -> None:
        self.folder, self.keep, self.keep_every, self.beside = folder, keep, keep_every, beside
        self.saved_step = -1
        self._passing: Path | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def begin(self, state: dict[str, Any], tensors: Snapshot, *, passing: bool = False) -> None:
        """Begin to save; `outcome` must have told of the one before. One in `passing` lasts until the next."""
        assert self._pending is None
        self._pending = self._thread.submit(self._save, state, tensors, passing)

    def close(self) -> None:
        """Wait until nothing is being written."""
        self._thread.shutdown()

    def outcome(self, *, wait: bool) -> NotSaved | NotTidied | None:
        """Return what went wrong with the last save, once; None if nothing did or, without `wait`, has yet."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        error, self._pending = self._pending.exception(), None
        if error is not None and not isinstance(error, NotSaved | NotTidied):
            raise error
        return error

    def _save(self, state: dict[str, Any], tensors: Snapshot, passing: bool) -> None:
        keep = {"keep": self.keep + passing, "keep_every": self.keep_every}
        try:
            save(self.folder, state, tensors, **keep, beside=self.beside, superseded=self._passing)
        except NotTidied:
            self._note(state["step"], passing)
            raise
        self._note(state["step"], passing)

    def _note(self, step: int, passing: bool) -> None:
        self.saved_step = step
        self._passing = self.folder / f"step_{step:08d}" if passing else None


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes `verify`, if any, and a message for each one passed over.

    Raises Unreadable for one that cannot be read now: to go on from an older one would give up what it holds.
    """
    damaged: list[str] = []
    for _, path in sorted(_steps(folder), reverse=True):
        try:
            _verify_patiently(path)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def _verify_patiently(path: Path) -> None:
    for pause in _PAUSES_S:
        try:
            verify(path)
        except (Unreadable, DamagedCheckpoint) as error:
            if isinstance(error, DamagedCheckpoint) and getattr(error.__cause__, "errno", None) != errno.EIO:
                raise
            time.sleep(pause)
        else:
            return
    verify(path)


def verify(path: Path) -> dict[str, Any]:
    """Check every file's size and sha256 against state.json and return the state.

    Raises:
        DamagedCheckpoint: a file is not what was saved.
        Unreadable: one cannot be read now.
    """
    try:
        with _reading(path / "state.json"):
            (path / "state.json").read_bytes()
        state = read_json(path / "state.json", "take another checkpoint")
        expected = {name: state["files"][name] for name in FILES}
        _check_state(state)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}/state.json cannot be read ({error!r})") from error
    for name, checksum in expected.items():
        with _reading(path / name):
            found = _checksum(path / name)
        if found != checksum:
            raise DamagedCheckpoint(f"{path}/{name} is damaged: {found} is not the recorded {checksum}")
    return state


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn an OSError into DamagedCheckpoint or Unreadable."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE:
            raise DamagedCheckpoint(f"{file} cannot be read ({error!r})") from error
        raise Unreadable(
            f"{file} cannot be read now ({error!r}), which says nothing about what it holds; nothing was changed. "
            "The same command tries again; to go on from an older checkpoint, move this one away"
        ) from error


_STATE: dict[str, tuple[type, ...]] = {
    **{"step": (int,), "validated": (int,), "skipped": (int,), "spikes": (int,), "timed_steps": (int,)},
    **{"world_size": (int,), "global_batch": (int,)},
    **{"wall_s": (int, float), "timed_s": (int, float), "peak_memory_mib": (int, float)},
    **{"recent_loss": (dict,), "config": (dict,), "identity": (dict, type(None))},
}
"""Types of the values of state.json that are looked at."""

_RECENT = {field.name for field in fields(RecentLoss)}


def _check_state(state: dict[str, Any]) -> None:
    """Raise ValueError for a value that `save` cannot have been given; only the step has to be there."""
    for key, kinds in _STATE.items():
        value = state.get(key)
        fine = key not in state or (isinstance(value, kinds) and not isinstance(value, bool))
        if not fine or (isinstance(value, int | float) and not 0 <= value < 2**63):
            raise ValueError(f"{key} is {value!r}")
    if "step" not in state or ("config" in state and not isinstance(state["config"].get("optim"), dict)):
        raise ValueError("step or config.optim is missing")
    for key, value in state.get("recent_loss", {}).items():
        if key not in _RECENT or not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"recent_loss.{key} is {value!r}")


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that `verify` has found whole."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], Generators]:
    """Load a verified checkpoint into `model` and `optimizer` in place; return its state and generator states.

    Where these are in shards, each process reads the files and takes its own.

    Raises ValueError if the tensors are not those of this model and optimizer, or a file holds something else.
    """
    try:
        _restore_model(model, load_file(path / FILES[0]))
        _restore_optimizer(model, optimizer, load_file(path / FILES[1]))
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} belongs to another model: {error}") from error
    return read_state(path), _load_generators(path / FILES[2])


def _load_generators(path: Path) -> Generators:
    try:
        generators = load_file(path)
        for name, state in generators.items():
            if name.endswith(".cpu"):
                torch.Generator().set_state(state)  # a trial: it refuses what is no generator's state
    except (RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no generators' states: {error}") from error
    return generators


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as {"PARAMETER.SLOT": tensor}; hyperparameters come from the config."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def _restore_model(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load a model's tensors; of tied ones any name will do. Raises RuntimeError if they are another model's."""
    targets = model.state_dict(keep_vars=True)
    given = {targets[name]: tensor for name, tensor in tensors.items() if name in targets}
    placed = {name: place_like(target, given[target]) for name, target in targets.items() if target in given}
    model.load_state_dict({**tensors, **placed})


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `_optimizer_tensors`. Raises KeyError for a tensor of a parameter that the model lacks."""
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        slots.setdefault(name, {})[slot] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    unknown = slots.keys() - set(order)
    if unknown:
        raise KeyError(f"optimizer tensors of unknown parameters {sorted(unknown)[:3]}")
    parameters = {name: parameter for parameter, name in names.items()}
    _check_slots(parameters, slots)
    state = {
        index: {slot: place_like(parameters[name], value) for slot, value in slots[name].items()}
        for index, name in enumerate(order)
        if name in slots
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_slots(parameters: dict[str, nn.Parameter], slots: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raise KeyError for a tensor that fits no optimizer: torch takes it, and fails in the next step."""
    kinds = {frozenset(own) for own in slots.values()}
    for name, own in slots.items():
        for slot, tensor in own.items():
            if tensor.numel() != 1 and tensor.shape != parameters[name].shape:
                raise KeyError(f"{name}.{slot} of shape {tuple(tensor.shape)}")
        if any(own.keys() < kind for kind in kinds):
            raise KeyError(f"{name} has {', '.join(own)} only")


def get_generators(device: torch.device) -> Generators:
    """Return the states of torch's generators: "cpu", and "cuda" where that is the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Generators, device: torch.device) -> None:
    """Undo `get_generators`; a generator without a state is left as it is."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def of_all_processes(states: Generators, accelerator: Accelerator) -> Generators:
    """Return every process's states as "RANK.NAME"; to be called by all of them."""
    everyones: Generators = {}
    for name, state in states.items():
        rows = accelerator.gather(state.to(accelerator.device)[None])
        everyones |= {f"{rank}.{name}": row.cpu().clone() for rank, row in enumerate(rows)}
    return everyones


def of_process(states: Generators, rank: int) -> Generators:
    """Return the states of one process from `of_all_processes`; none if it was not there."""
    return {name.removeprefix(f"{rank}."): state for name, state in states.items() if name.startswith(f"{rank}.")}
