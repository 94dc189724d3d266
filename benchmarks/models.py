"""Models with random weights and their training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def autocast(device: torch.device, enabled: bool | None = None) -> torch.autocast:
    """Return bfloat16 autocast, enabled on a GPU by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if enabled is None else enabled)


def precision_name(precision: torch.autocast) -> str:
    """Return the name of the precision for a table's remark."""
    return "bfloat16 autocast" if precision._enabled else "float32"


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Return fused AdamW over all trainable weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def train_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, precision: torch.autocast) -> None:
    """Run forward, backward and optimizer."""
    with precision:
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return the bytes of weights, buffers and optimizer state, each storage once."""
    entries = [] if optimizer is None else optimizer.state.values()
    state: Iterable[object] = (value for entry in entries for value in entry.values())
    tensors = [t for t in (*model.parameters(), *model.buffers(), *state) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def language_model(size: str, variant: str, positions: int, layers: int | None = None, **settings: Any) -> Any:
    """Return a MoALlamaForCausalLM of a named size with at least `positions` positions."""
    from moa_lm import MoALlamaForCausalLM, named_config

    depth = {"num_hidden_layers": layers} if layers else {}
    positions = max(2048, positions)
    return MoALlamaForCausalLM(named_config(size, variant, max_position_embeddings=positions, **depth, **settings))


def lm_loss(model: Callable[..., Any], tokens: Tensor, **settings: Any) -> Tensor:
    """Return the next-token loss on tokens (B, T)."""
    return model(input_ids=tokens, labels=tokens, use_cache=False, **settings).loss
