"""The random generators of a process: their states as tensors, so that a run can continue with the same numbers."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

Generators = dict[str, Tensor]
"""Generator names to states, 1-D uint8 on the CPU."""


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
