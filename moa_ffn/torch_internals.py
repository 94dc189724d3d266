"""Undocumented parts of torch that the layer depends on, each with its reason. Tested with torch 2.11 and 2.15."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["constant_in_graphs", "has_hooks", "import_inductor", "is_intercepted", "is_transformed"]


def is_transformed(x: Any) -> bool:
    """Return whether only plain operations with torch's own derivative rules can be applied to `x`.

    True under torch.compile, torch.export, torch.jit.trace, torch.fx (a proxy), the transforms of torch.func (vmap,
    grad, jvp, ...) and forward-mode AD. There, an autograd.Function, `out=` and in-place operations fail or are
    recorded wrongly, and a decision by shape becomes a constant of the graph.
    """
    return (
        torch.compiler.is_compiling()
        or not isinstance(x, torch.Tensor)
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or is_legacy_batchedtensor(x)  # autograd.grad(is_grads_batched=True)
        or forward_ad._current_level >= 0
    )


def is_intercepted(x: Any) -> bool:
    """Return whether code outside torch observes each operation on `x`, which compiled regions would hide.

    True for `is_transformed`, tensor subclasses (fake tensors, DTensor), dispatch modes (FlopCounterMode,
    FakeTensorMode, make_fx, memory trackers) and function modes other than that of `torch.set_default_device`.
    """
    return (
        is_transformed(x)
        or type(x) not in (torch.Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether `module` has hooks. torch has no public query; hooks are stored in these four dictionaries."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function whose result torch.compile treats as a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def import_inductor() -> None:
    """Import Inductor's CPU compiler without its warning on machines with a CUDA toolkit and no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("torch.utils.cpp_extension")
    finally:
        logger.setLevel(level)
