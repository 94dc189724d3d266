"""Parameter groups; AdamW, or Muon for hidden matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from moa_train.config import OptimConfig
from moa_train.muon import UPDATE_SCALES, StackedMuon

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types with a fused AdamW kernel."""


class Combined(Optimizer):
    """Several optimizers over parameters of their own, used, saved and resumed as one.

    `param_groups` are their groups' own dicts, one optimizer's after the other's, and `state` is one mapping that all
    of them share: a rate that is set here is theirs, and a state dict holds them all, as that of any optimizer.

    Args:
        optimizers: Unused ones: the first step is still to come.

    Raises:
        ValueError: a parameter is in two groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self._hand_out()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over a group of one of the optimizers. Raises ValueError for any other, which none would step."""
        if not any(param_group is group for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ValueError("add_param_group: a group is added to one of the optimizers, before they are combined")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimizer; return what `closure`, called once before, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of load_state_dict too: with new groups and a new state
        self._hand_out()

    def _hand_out(self) -> None:
        """Give every optimizer its groups, and all of them the state."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            own = list(islice(groups, len(optimizer.param_groups)))
            optimizer.__setstate__({"state": self.state, "param_groups": own})


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group with weight decay and one without.

    Decayed are parameters with two or more dimensions whose name is not in `no_decay` (so biases, norms and other
    vectors never are). Each group is {"params", "weight_decay"}; an empty group is left out.

    Raises:
        ValueError: a name in `no_decay` is no trainable parameter of the model.
    """
    named = _trainable(model)
    _check_names(model, named, "no_decay", no_decay)
    groups = _by_decay(named, weight_decay, no_decay)
    _assert_each_once(named, groups)
    return groups


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    no_decay: Collection[str] = (),
    hidden_matrices: Collection[str] | None = None,
) -> Optimizer:
    """Return the optimizer of all trainable parameters that `config.algorithm` names.

    adamw: AdamW over `parameter_groups`. muon: the parameters in `hidden_matrices` go to Muon, matrices to torch's,
    stacks of matrices and whatever is in shards to `StackedMuon`; all others go to AdamW, at `config.adamw_lr_scale`
    times the rate (their groups' "lr_scale"). Weight decay as in `parameter_groups`. AdamW is fused where that is
    asked for and the parameters' device has the kernel.

    Args:
        model: The model, on its device.
        config: The optimizer's settings.
        no_decay: Names of parameters with two or more dimensions that have no weight decay.
        hidden_matrices: Names of the matrices (A, B) and stacks (E, A, B) for Muon; AdamW alone has no use for them.

    Raises:
        ValueError: muon without hidden matrices; a name is no trainable parameter of the model; a hidden matrix is
            neither a matrix nor a stack of them.
    """
    if config.algorithm == "adamw":
        return _adamw(parameter_groups(model, config.weight_decay, no_decay), config)
    if not hidden_matrices:
        raise ValueError(
            "optim.algorithm is 'muon'; it must be 'adamw' here, since the task names no hidden matrices of "
            f"{type(model).__name__}"
        )
    named = _trainable(model)
    _check_names(model, named, "no_decay", no_decay)
    _check_names(model, named, "hidden_matrices", hidden_matrices)
    combined = Combined(_muon_and_adamw(named, config, no_decay, hidden_matrices))
    _assert_each_once(named, combined.param_groups)
    set_rate(combined, config.lr)
    return combined


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every group to `lr`, times the group's "lr_scale" where it has one (timm's convention)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_groups(optimizer: Optimizer) -> str:
    """Return e.g. "AdamW: 50 tensors (5,359,104) with weight decay 0.05; 101 tensors (38,592) without".

    Groups that differ in their rate only are told together, followed by the range of their "lr_scale". Muon's part
    says how an update of A rows and B columns is scaled, and tells matrices from stacks of E matrices:
    "Muon (update 0.2 sqrt(max(A, B))): 48 matrices (28,311,552) and 36 stacks of 32 (84,934,656) with weight decay
    0.1; AdamW: ...".
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for one in optimizer.optimizers if isinstance(optimizer, Combined) else (optimizer,):
        for group in one.param_groups:
            families.setdefault(_title(one, group), []).append(group)
    return "; ".join(f"{title}: {_describe(groups)}" for title, groups in families.items())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_names(model: nn.Module, named: Mapping[str, Tensor], argument: str, names: Collection[str]) -> None:
    strangers = sorted(set(names) - named.keys())
    if strangers:
        raise ValueError(f"{argument} names {strangers}, which are not trainable parameters of {type(model).__name__}")


def _by_decay(
    named: Mapping[str, nn.Parameter], weight_decay: float, no_decay: Collection[str]
) -> list[dict[str, Any]]:
    """Return the group with weight decay and the one without, in this order, each if it has a parameter."""
    decayed, plain = [], []
    for name, parameter in named.items():
        (decayed if parameter.ndim >= 2 and name not in no_decay else plain).append(parameter)
    groups = ((decayed, weight_decay), (plain, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def _assert_each_once(named: Mapping[str, nn.Parameter], groups: Sequence[dict[str, Any]]) -> None:
    placed = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert placed == sorted(map(id, named.values())), "every parameter belongs to exactly one group"


def _muon_and_adamw(
    named: Mapping[str, nn.Parameter],
    config: OptimConfig,
    no_decay: Collection[str],
    hidden_matrices: Collection[str],
) -> list[Optimizer]:
    """Return the optimizers of matrices, of stacks of matrices and of everything else, those that have something."""
    hidden = {name: parameter for name, parameter in named.items() if name in hidden_matrices}
    for name, parameter in hidden.items():
        if parameter.ndim not in (2, 3):
            shape = f"{name!r} of shape {tuple(parameter.shape)}"
            raise ValueError(f"hidden_matrices names {shape}; allowed are matrices (A, B) and stacks of them (E, A, B)")

    def groups(part: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        return _by_decay(part, config.weight_decay, no_decay)

    matrices = groups({name: parameter for name, parameter in hidden.items() if parameter.ndim == 2})
    stacks = groups({name: parameter for name, parameter in hidden.items() if parameter.ndim == 3})
    others = groups({name: parameter for name, parameter in named.items() if name not in hidden})
    for group in others:
        group["lr_scale"] = config.adamw_lr_scale
    muon: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "adjust_lr_fn": config.muon_scale}
    in_shards = any(isinstance(parameter, DTensor) for parameter in hidden.values())
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(StackedMuon(matrices, **muon) if in_shards else Muon(matrices, **muon))
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
    """Return how many tensors have which weight decay, and how their rates are scaled."""
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
    scales = [group.get("lr_scale", 1.0) for group in groups]
    if min(scales) < max(scales):
        parts.append(f"rates scaled by {min(scales):.3g} to {max(scales):.3g}")
    elif scales[0] != 1:
        parts.append(f"rates scaled by {scales[0]:.3g}")
    return "; ".join(parts)


def _count(tensors: Sequence[Tensor], *, by_shape: bool) -> str:
    """Return e.g. "5 tensors (1,234)", or "3 matrices (1,000) and 2 stacks of 4 (234)"."""
    kinds: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        kind = "matrices" if tensor.ndim == 2 else f"stacks of {len(tensor)}"
        kinds.setdefault(kind if by_shape else "tensors", []).append(tensor)
    return " and ".join(f"{len(many)} {kind} ({sum(map(Tensor.numel, many)):,})" for kind, many in kinds.items())
