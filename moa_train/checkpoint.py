"""Checkpoints: folders of safetensors and JSON, complete or absent, verified before use; nothing is pickled.

checkpoints/step_00001000/model.safetensors         weights by parameter name
                          optimizer.safetensors     optimizer state, "PARAMETER.SLOT"
                          generators.safetensors    random generators, "RANK.cpu" and "RANK.cuda"
                          state.json                step, times, config; SHA-256 of itself and of the files above
checkpoints/LAST                                    name of the folder written last, for people and scripts
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moa_train.atomic_io import new_folder, write_json, write_text
from moa_train.distributed import full, shard_like
from moa_train.errors import ConfigError, DataError, RunError
from moa_train.reading import read_json

FILES = ("model.safetensors", "optimizer.safetensors", "generators.safetensors")

Generators = dict[str, torch.Tensor]
"""States of random generators by name, 1-D uint8 on the CPU."""

Snapshot = dict[str, dict[str, torch.Tensor]]
"""Tensors of each of `FILES`, on the CPU."""


class DamagedCheckpoint(DataError):
    """A checkpoint whose files are missing, truncated or changed; the message names the file."""


class SaveError(RunError):
    """A checkpoint or another file of the run that cannot be written, usually because the disk is full."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the disk, such as a full one, into a SaveError that names what cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{what} could not be written: {error}; free disk space, then the same command continues from the last "
            "checkpoint"
        ) from error


@dataclass
class TrainState:
    """Progress of a run: the part of a checkpoint that is no tensor.

    Attributes:
        step: Finished optimizer steps.
        validated: Last step that was validated.
        wall_s: Seconds of training steps in all sessions, including the wait for data.
        timed_steps: Steps after each session's warm-up (`moa_train.progress.WARMUP_STEPS`).
        timed_s: Seconds of these steps.
        peak_memory_mib: Peak memory of all sessions, MiB.
        skipped: Steps skipped because their loss or gradient was not finite.
    """

    step: int = 0
    validated: int = 0
    wall_s: float = 0.0
    timed_steps: int = 0
    timed_s: float = 0.0
    peak_memory_mib: float = 0.0
    skipped: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TrainState:
        """Return the state in a checkpoint's state.json."""
        return cls(**{key: saved[key] for key in asdict(cls())})


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, generators: Generators, *, main: bool = True
) -> Snapshot:
    """Copy a checkpoint's tensors to the CPU, so that training can continue while they are written.

    All ranks call it together: parameters in shards are gathered one at a time. The snapshot of ranks other than the
    `main` one is empty. `model` is the bare module, without a DDP wrapper.
    """
    saved = model.state_dict().keys()
    named = chain(model.named_parameters(), model.named_buffers())  # tied parameters once
    weights = {name: tensor for name, tensor in named if name in saved}
    copied: Snapshot = {}
    for file, tensors in zip(FILES, (weights, _optimizer_tensors(model, optimizer), generators), strict=True):
        copied[file] = {}
        for name, tensor in tensors.items():
            whole = full(tensor.detach())
            if main:
                copied[file][name] = whole.to("cpu", copy=True).contiguous()
    return copied


def save(
    folder: Path, state: dict[str, Any], tensors: Snapshot, *, keep_latest: int, keep_interval: int | None = None
) -> Path:
    """Write `folder`/step_XXXXXXXX, point LAST at it, and delete old checkpoints.

    The newest `keep_latest` checkpoints stay, and those whose step is a multiple of `keep_interval`. Checkpoints of
    later steps are deleted: they are damaged, or the run has been continued from an earlier one.

    `state` has JSON values with an int "step". Raises SaveError if the files cannot be written.
    """
    final = folder / f"step_{state['step']:08d}"
    with disk_errors(str(final)):
        with new_folder(final) as temporary:
            for name in FILES:
                save_file(tensors[name], temporary / name)
            state = {**state, "files": {name: _file_sha256(temporary / name) for name in FILES}}
            write_json(temporary / "state.json", {**state, "sha256": _state_sha256(state)})
        write_text(folder / "LAST", final.name + "\n")
        _delete_old(final, keep_latest, keep_interval)
    return final


def _delete_old(newest: Path, keep_latest: int, keep_interval: int | None) -> None:
    earlier = [(step, path) for step, path in _checkpoints(newest.parent) if path.name <= newest.name]
    later = [path for _, path in _checkpoints(newest.parent) if path.name > newest.name]
    old = [path for step, path in earlier[keep_latest:] if keep_interval is None or step % keep_interval]
    for path in (*later, *old):
        path.rename(path.with_name(f".{path.name}.old"))  # a visible checkpoint is always complete
    remove_leftovers(newest.parent)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all checkpoints, newest first."""
    paths = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(((int(path.name.removeprefix("step_")), path) for path in paths), reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Delete incomplete and superseded checkpoints."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


class Saver:
    """Saves one checkpoint at a time in a background thread; see `save` for the arguments."""

    def __init__(self, folder: Path, *, keep_latest: int, keep_interval: int | None = None) -> None:
        self.folder, self.keep_latest, self.keep_interval = folder, keep_latest, keep_interval
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def begin(self, state: dict[str, Any], tensors: Snapshot) -> None:
        """Begin to save, after the save before has ended. Raises SaveError if that one has failed."""
        self.wait()
        kept = {"keep_latest": self.keep_latest, "keep_interval": self.keep_interval}
        self._pending = self._thread.submit(save, self.folder, state, tensors, **kept)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises SaveError if the last save has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until nothing is being written, whatever the outcome."""
        self._thread.shutdown()


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes `verify`, if any, and a message for each damaged one before it."""
    damaged: list[str] = []
    for _, path in _checkpoints(folder):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def verify(path: Path) -> dict[str, Any]:
    """Check the SHA-256 of every file of a checkpoint and return its state.

    Raises:
        DamagedCheckpoint: A file is missing or is not what was saved.
        RunError: A file cannot be read for another reason, such as a stale handle or missing permission.
    """
    try:
        (path / "state.json").read_bytes()  # an OSError is no damage
        state = read_json(path / "state.json", "use another checkpoint")
        if state.pop("sha256", None) != _state_sha256(state):
            raise DamagedCheckpoint(f"{path}/state.json is damaged: its SHA-256 differs")
        for name in FILES:
            if _file_sha256(path / name) != state["files"][name]:
                raise DamagedCheckpoint(f"{path}/{name} is damaged: its SHA-256 differs")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{error.filename} is missing") from error
    except DataError as error:
        raise DamagedCheckpoint(str(error)) from error
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error}); the same command tries again. To continue from an older checkpoint, "
            "move this one away"
        ) from error
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that `verify` has found valid."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[TrainState, Generators]:
    """Load a valid checkpoint into `model` and `optimizer` in place; return its progress and generator states.

    All ranks read the files; those of a sharded model keep their shards. Raises ConfigError if the weights are not
    those of this model.
    """
    _load_model(path, model)
    _load_optimizer(load_file(path / FILES[1]), model, optimizer)
    return TrainState.of(read_state(path)), load_file(path / FILES[2])


def _load_model(path: Path, model: nn.Module) -> None:
    saved, targets = load_file(path / FILES[0]), model.state_dict(keep_vars=True)
    found = {targets[name]: tensor for name, tensor in saved.items() if name in targets}  # tied ones are saved once
    missing = {name for name, target in targets.items() if target not in found or found[target].shape != target.shape}
    if wrong := sorted(missing | (saved.keys() - targets.keys())):
        raise ConfigError(f"checkpoint {path} belongs to another model: {', '.join(wrong[:3])} differ in name or shape")
    model.load_state_dict({name: shard_like(target, found[target]) for name, target in targets.items()})


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as {"PARAMETER.SLOT": tensor}; hyperparameters come from the config."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def _load_optimizer(tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `_optimizer_tensors` has returned."""
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        slots.setdefault(name, {})[slot] = tensor
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {slot: shard_like(parameter, value) for slot, value in slots.get(names[parameter], {}).items()}
        for index, parameter in enumerate(parameters)
    }
    filled = {index: own for index, own in state.items() if own}  # before the first step there is no state
    optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})


def get_generators(device: torch.device) -> Generators:
    """Return the states of torch's global generators: "cpu", and "cuda" if that is the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Generators, device: torch.device) -> None:
    """Restore the states from `get_generators`; a generator without a state is left alone."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def gather_generators(states: Generators, accelerator: Accelerator) -> Generators:
    """Return the states of all ranks as "RANK.NAME"; all ranks call it together."""
    gathered: Generators = {}
    for name, state in states.items():
        rows = accelerator.gather(state.to(accelerator.device)[None])
        gathered |= {f"{rank}.{name}": row.cpu().clone() for rank, row in enumerate(rows)}
    return gathered


def generators_of(states: Generators, rank: int) -> Generators:
    """Return the states of one rank from `gather_generators`; empty if the rank did not exist."""
    return {name.removeprefix(f"{rank}."): state for name, state in states.items() if name.startswith(f"{rank}.")}
