"""Whole training steps: models, their steps and what they hold, for the benchmarks that time them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def autocast(device: torch.device, enabled: bool | None = None) -> torch.autocast:
    """bfloat16 over float32 weights; by default on a GPU only."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if enabled is None else enabled)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over all trainable weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def train_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, precision: torch.autocast) -> None:
    """Forward, backward, optimizer."""
    with precision:
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes between two steps: weights, buffers and the optimizer's state, each storage once."""
    entries = [] if optimizer is None else optimizer.state.values()
    state: Iterable[object] = (value for entry in entries for value in entry.values())
    tensors = [t for t in (*model.parameters(), *model.buffers(), *state) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def precision_name(precision: torch.autocast) -> str:
    """For the line above a table."""
    return "bfloat16 autocast" if precision._enabled else "float32"
