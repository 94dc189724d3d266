"""Parameter groups and optimizers: AdamW, or Muon for hidden matrices with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from moa_train.config import OptimConfig
from moa_train.errors import require
from moa_train.muon import UPDATE_SCALES, StackedMuon

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types with a fused AdamW kernel."""


class Combined(Optimizer):
    """Several optimizers of disjoint parameters, stepped, saved and resumed as one.

    `param_groups` contains the optimizers' own group dicts, and all optimizers share one `state` mapping. A learning
    rate that is set here applies to them, and a state dict holds all of them.

    Args:
        optimizers: Optimizers that have not taken a step.

    Raises:
        ValueError: A parameter is in two groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # called by load_state_dict, with new groups and a new state
        self._share()

    def _share(self) -> None:
        """Give every optimizer its groups and the common state."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            own = list(islice(groups, len(optimizer.param_groups)))
            optimizer.__setstate__({"state": self.state, "param_groups": own})


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group with weight decay and one without.

    Weight decay applies to parameters with two or more dimensions whose name is not in `no_decay`. Each group is
    {"params", "weight_decay"}; an empty group is left out.

    Raises:
        ValueError: A name in `no_decay` is no trainable parameter of the model.
    """
    named = _trainable(model)
    _check_names(model, named, "no_decay", no_decay)
    return _by_decay(named, weight_decay, no_decay)


def build_optimizer(
    model: nn.Module, config: OptimConfig, no_decay: Collection[str] = (), hidden_matrices: Collection[str] = ()
) -> Optimizer:
    """Return the optimizer of all trainable parameters that `config.algorithm` names.

    adamw: AdamW over `parameter_groups`. muon: torch's Muon for hidden matrices, `StackedMuon` for stacks of matrices
    and for matrices in shards, and AdamW at `config.adamw_lr_scale` times the learning rate for all other parameters.
    Weight decay is that of `parameter_groups`.

    Args:
        model: The model, on its device.
        config: Optimizer settings.
        no_decay: Names of parameters with two or more dimensions that get no weight decay.
        hidden_matrices: Names of the matrices (A, B) and stacks (E, A, B) for Muon; unused with adamw.

    Raises:
        ConfigError: muon for a model without hidden matrices.
        ValueError: A name is no trainable parameter of the model.
    """
    if config.algorithm == "adamw":
        return _adamw(parameter_groups(model, config.weight_decay, no_decay), config)
    name = type(model).__name__
    require("optim.algorithm", "muon", bool(hidden_matrices), f"'adamw': {name} has no hidden matrices for Muon")
    named = _trainable(model)
    _check_names(model, named, "no_decay", no_decay)
    _check_names(model, named, "hidden_matrices", hidden_matrices)
    combined = Combined(_muon_and_adamw(named, config, no_decay, hidden_matrices))
    set_rate(combined, config.lr)
    return combined


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr`, times the group's "lr_scale" if it has one (timm's convention)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_groups(optimizer: Optimizer) -> str:
    """Return e.g. "AdamW: 50 tensors (5,359,104) with weight decay 0.05; 101 tensors (38,592) without".

    Groups that differ in their learning rate only are counted together. Muon's part contains the scale of an update
    (A, B) and separates matrices from stacks of matrices.
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for one in optimizer.optimizers if isinstance(optimizer, Combined) else (optimizer,):
        for group in one.param_groups:
            families.setdefault(_title(one, group), []).append(group)
    return "; ".join(f"{title}: {_describe(groups)}" for title, groups in families.items())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_names(model: nn.Module, named: Mapping[str, Tensor], argument: str, names: Collection[str]) -> None:
    unknown = sorted(set(names) - named.keys())
    if unknown:
        raise ValueError(f"{argument} names {unknown}, which are not trainable parameters of {type(model).__name__}")


def _by_decay(
    named: Mapping[str, nn.Parameter], weight_decay: float, no_decay: Collection[str]
) -> list[dict[str, Any]]:
    """Return the group with weight decay and the one without, except for empty groups."""
    decayed, others = [], []
    for name, parameter in named.items():
        (decayed if parameter.ndim >= 2 and name not in no_decay else others).append(parameter)
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def _muon_and_adamw(
    named: Mapping[str, nn.Parameter],
    config: OptimConfig,
    no_decay: Collection[str],
    hidden_matrices: Collection[str],
) -> list[Optimizer]:
    """Return the optimizers of matrices, stacks of matrices and all other parameters, without empty ones."""
    hidden = {name: parameter for name, parameter in named.items() if name in hidden_matrices}

    def groups(part: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return _by_decay(part, config.weight_decay, no_decay)

    matrices = groups({name: parameter for name, parameter in hidden.items() if parameter.ndim == 2})
    stacks = groups({name: parameter for name, parameter in hidden.items() if parameter.ndim != 2})
    others = groups({name: parameter for name, parameter in named.items() if name not in hidden})
    for group in others:
        group["lr_scale"] = config.adamw_lr_scale
    muon: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "adjust_lr_fn": config.muon_scale}
    sharded = any(isinstance(parameter, DTensor) for parameter in hidden.values())
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(StackedMuon(matrices, **muon) if sharded else Muon(matrices, **muon))
    optimizers += [StackedMuon(stacks, **muon)] if stacks else []
    optimizers += [_adamw(others, config)] if others else []
    return optimizers


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    fused = config.fused and groups[0]["params"][0].device.type in FUSED_DEVICES
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _title(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    if isinstance(optimizer, Muon | StackedMuon):
        return f"Muon (update {UPDATE_SCALES[group['adjust_lr_fn']].formula})"
    return type(optimizer).__name__


def _describe(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of tensors by weight decay."""
    by_decay: dict[float, list[Tensor]] = {}
    for group in groups:
        by_decay.setdefault(group["weight_decay"], []).extend(group["params"])
    is_muon = "adjust_lr_fn" in groups[0]
    parts = [
        _count(tensors, by_shape=is_muon) + (f" with weight decay {decay:g}" if decay else " without")
        for decay, tensors in sorted(by_decay.items(), reverse=True)
    ]
    if not any(by_decay):
        parts[0] += " weight decay"
    return "; ".join(parts)


def _count(tensors: Sequence[Tensor], *, by_shape: bool) -> str:
    """Return e.g. "5 tensors (1,234)", or "3 matrices (1,000) and 2 stacks of 4 (234)"."""
    kinds: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        kind = "matrices" if tensor.ndim == 2 else f"stacks of {len(tensor)}"
        kinds.setdefault(kind if by_shape else "tensors", []).append(tensor)
    return " and ".join(f"{len(many)} {kind} ({sum(map(Tensor.numel, many)):,})" for kind, many in kinds.items())
