"""Parameter groups, AdamW and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from moa_train.config import OptimConfig

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types with a fused AdamW kernel."""


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of the optimizer step that follows `step` finished ones.

    Linear from 0 over the first `warmup_steps`, then half a cosine from `lr` to `min_lr` at `total_steps`, as in the
    MAE recipe (facebookresearch/mae, util/lr_sched.py), step by step rather than epoch by epoch.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group with weight decay and one without.

    Decayed are parameters with two or more dimensions whose name is not in `no_decay` (so biases, norms and other
    vectors never are). Each group is {"params", "weight_decay"}; an empty group is left out.

    Raises:
        ValueError: a name in `no_decay` is no trainable parameter of the model.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    strangers = sorted(set(no_decay) - named.keys())
    if strangers:
        raise ValueError(f"no_decay names {strangers}, which are not trainable parameters of {type(model).__name__}")
    decayed, plain = [], []
    for name, parameter in named.items():
        (decayed if parameter.ndim >= 2 and name not in no_decay else plain).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0))
        if parameters
    ]
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(placed) == len(set(placed)) == len(named), "every parameter belongs to exactly one group"
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig, no_decay: Collection[str] = ()) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; fused where asked for and the parameters' device has the kernel."""
    groups = parameter_groups(model, config.weight_decay, no_decay)
    device = groups[0]["params"][0].device.type
    fused = config.fused and device in FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to `lr`, times the group's "lr_scale" where it has one (timm's convention)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Return e.g. "AdamW: 50 tensors (5,359,104) with weight decay 0.05; 101 tensors (38,592) without".

    Groups that differ in their rate only are told together, followed by the range of their "lr_scale".
    """
    parameters: dict[float, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        parameters.setdefault(group["weight_decay"], []).extend(group["params"])
    parts = [
        f"{len(tensors)} tensors ({sum(tensor.numel() for tensor in tensors):,}) "
        + (f"with weight decay {decay:g}" if decay else "without")
        for decay, tensors in sorted(parameters.items(), reverse=True)
    ]
    if not any(parameters):
        parts[0] += " weight decay"
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    if min(scales) < max(scales):
        parts.append(f"rates scaled by {min(scales):.3g} to {max(scales):.3g}")
    return f"{type(optimizer).__name__}: " + "; ".join(parts)
