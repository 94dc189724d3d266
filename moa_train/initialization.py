"""Initial weights drawn by name, so that models that differ in one part start with all other parameters equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn


def init_by_name(model: nn.Module, seed: int, init: Callable[[nn.Module], object]) -> None:
    """Call init(module) for every module, children first, with a random stream of (seed, name) for each.

    The weights of a module depend neither on other modules nor on their order. torch's CPU generator is restored.

    Args:
        model: The model, on the CPU or the meta device.
        seed: Seed of the run.
        init: Initializes the parameters of one module in place; may override those of its children.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed(list(model.named_modules())):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            init(module)
