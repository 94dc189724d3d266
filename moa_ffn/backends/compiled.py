"""The mixture's forward and backward compiled to C++ by Inductor, for callers that do not use torch.compile.

Compiled, the formulas of eager.py are one pass over the tensors. Each pair of dictionaries is compiled once for all
numbers of tokens and widths, in some seconds; Inductor caches the result on disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from moa_ffn.backends import eager
from moa_ffn.backends.eager import Gradients
from moa_ffn.coefficients import Coefficients
from moa_ffn.spec import Dictionaries
from moa_ffn.torch_internals import import_inductor, is_intercepted

_logger = logging.getLogger(__name__)

SWITCH = "MOA_FFN_COMPILE"
"""Environment variable; "0" disables compilation in this package."""

MIN_ELEMENTS = 2**16
"""Elements of a below which eager operations are faster than the call of a compiled region."""


def unavailable_reason() -> str | None:
    """Return why Inductor cannot compile for this CPU, or None. The first call compiles a test, in some seconds."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 is set"
    return _tried()


@lru_cache
def _tried() -> str | None:
    try:
        import_inductor()
        with torch.no_grad():
            torch.compile(torch.relu, fullgraph=True, dynamic=True)(torch.zeros(32))
    except Exception as error:  # a missing or broken compiler raises errors of many types
        reason = f"torch's Inductor cannot compile for this CPU ({str(error).strip().splitlines()[0]})"
        _logger.warning("mixtures are not fused: %s; install a C++ compiler such as g++ to speed them up", reason)
        return reason
    return None


def forward(a: Tensor, b: Tensor | None, coefficients: Coefficients, dictionaries: Dictionaries) -> Tensor:
    """Return `eager.forward` for a (N, H), compiled where that is faster and possible."""
    if not _pays(a):
        return eager.forward(a, b, coefficients, dictionaries)
    return _run(eager.flat_forward, a, b, *coefficients, dictionaries=dictionaries)[0]


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    coefficients: Coefficients,
    dictionaries: Dictionaries,
    with_output: bool = False,
) -> Gradients:
    """Return `eager.backward` for a (N, H), compiled where that is faster and possible."""
    if torch.is_grad_enabled() or not _pays(grad):  # a compiled region has no backward
        return eager.backward(grad, a, b, coefficients, dictionaries, with_output)
    settings = {"dictionaries": dictionaries, "with_output": with_output}
    return eager.unflatten(_run(eager.flat_backward, grad, a, b, *coefficients, **settings))


def mixture(a: Tensor, b: Tensor | None, coefficients: Coefficients, dictionaries: Dictionaries) -> Tensor:
    """Return `eager.mixture`, differentiable, for any leading shape."""
    rows = (None if t is None else t.reshape(-1, *t.shape[a.ndim - 1 :]) for t in (a, b, *coefficients))
    return eager.MixtureFunction.apply(*rows, dictionaries, forward, backward).view(a.shape)


def _pays(a: Tensor) -> bool:
    return a.numel() >= MIN_ELEMENTS and not is_intercepted(a) and unavailable_reason() is None


def _run(formula: Callable[..., Any], *tensors: Any, **settings: Any) -> Any:
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    region = _compiled(formula, tensors[0].dtype, threads, inference, **settings)
    return region(*(None if t is None else t.detach() for t in tensors))  # no autograd state to specialize on


@lru_cache(None)
def _compiled(
    formula: Callable[..., Any], dtype: torch.dtype, threads: int, inference: bool, **settings: Any
) -> Callable[..., Any]:
    """Return a compiled region for one combination of everything that torch.compile specializes on.

    Each region has a code object of its own because torch.compile limits recompilations per code object.
    """

    def region(*tensors: Tensor | None) -> Any:
        return formula(*tensors, **settings)

    own = FunctionType(region.__code__.replace(), region.__globals__, region.__name__, None, region.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True)
