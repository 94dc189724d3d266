"""Parameter groups and optimizers: AdamW, or Muon for hidden matrices with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moa_train.config import OptimConfig
from moa_train.errors import require
from moa_train.muon import Muon

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types with a fused AdamW kernel."""


class Combined(Optimizer):
    """Several optimizers of disjoint parameters, stepped, saved and resumed as one.

    `param_groups` contains the optimizers' own group dicts, and all optimizers share one `state` mapping. A learning
    rate that is set here applies to them, and a state dict holds all of them.
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


def parameter_groups(
    named: Mapping[str, nn.Parameter], weight_decay: float, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the group with weight decay and the one without, except for empty groups.

    Weight decay applies to parameters with two or more dimensions whose name is not in `no_decay`.
    """
    decayed, others = [], []
    for name, parameter in named.items():
        (decayed if parameter.ndim >= 2 and name not in no_decay else others).append(parameter)
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def build_optimizer(
    model: nn.Module, config: OptimConfig, no_decay: Collection[str] = (), hidden_matrices: Collection[str] = ()
) -> Optimizer:
    """Return the optimizer of all trainable parameters that `config.algorithm` names.

    adamw: AdamW over `parameter_groups`. muon: `moa_train.muon.Muon` for hidden matrices, and AdamW at
    `config.adamw_lr_scale` times the learning rate for all other parameters. Weight decay is that of
    `parameter_groups`.

    `no_decay` and `hidden_matrices`, the matrices (A, B) and stacks (E, A, B) for Muon, are names of parameters.

    Raises:
        ConfigError: muon for a model without hidden matrices.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.algorithm == "adamw":
        return _adamw(parameter_groups(named, config.weight_decay, no_decay), config)
    name = type(model).__name__
    require("optim.algorithm", "muon", bool(hidden_matrices), f"'adamw': {name} has no hidden matrices for Muon")
    combined = Combined(_muon_and_adamw(named, config, no_decay, hidden_matrices))
    set_rate(combined, config.lr)
    return combined


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr`, times the group's "lr_scale" if it has one (timm's convention)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def describe_groups(optimizer: Optimizer) -> str:
    """Return e.g. "AdamW: 50 tensors (5,359,104) with weight decay 0.05; AdamW: 101 tensors (38,592) with ..."."""
    tensors: dict[tuple[str, float], list[Tensor]] = {}
    for one in optimizer.optimizers if isinstance(optimizer, Combined) else (optimizer,):
        for group in one.param_groups:
            tensors.setdefault((type(one).__name__, group["weight_decay"]), []).extend(group["params"])
    return "; ".join(
        f"{name}: {len(found)} tensors ({sum(map(Tensor.numel, found)):,}) with weight decay {decay:g}"
        for (name, decay), found in tensors.items()
    )


def _muon_and_adamw(
    named: Mapping[str, nn.Parameter],
    config: OptimConfig,
    no_decay: Collection[str],
    hidden_matrices: Collection[str],
) -> list[Optimizer]:
    """Return Muon for the hidden matrices and AdamW for all other parameters, without an empty one."""
    hidden = {name: parameter for name, parameter in named.items() if name in hidden_matrices}
    others = {name: parameter for name, parameter in named.items() if name not in hidden_matrices}
    optimizers: list[Optimizer] = [
        Muon(
            parameter_groups(hidden, config.weight_decay, no_decay),
            lr=config.lr,
            momentum=config.momentum,
            adjust_lr_fn=config.muon_scale,
        )
    ]
    if groups := parameter_groups(others, config.weight_decay, no_decay):
        for group in groups:
            group["lr_scale"] = config.adamw_lr_scale
        optimizers.append(_adamw(groups, config))
    return optimizers


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    fused = config.fused and groups[0]["params"][0].device.type in FUSED_DEVICES
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
