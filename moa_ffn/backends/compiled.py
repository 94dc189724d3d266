"""The mixture's forward and backward as regions that Inductor compiles to C++, for callers who compile nothing.

The formulas are eager.py's; compiled, each of them is one pass over the tensors. A region serves every number of
tokens and every width, takes seconds to compile once for a dictionary, and lies in Inductor's cache on disk then.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from moa_ffn.backends import eager
from moa_ffn.backends.eager import Names
from moa_ffn.torch_internals import import_inductor, is_intercepted

_logger = logging.getLogger(__name__)

SWITCH = "MOA_FFN_COMPILE"
"""Environment variable; "0" keeps the package from compiling anything."""

MIN_ELEMENTS = 2**16
"""Elements of a from which a compiled region is worth its call; fewer are left to eager operations."""


def unavailable_reason() -> str | None:
    """Why nothing can be compiled for the CPU here, or None. The first call tries it: some seconds."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 is set"
    return _tried()


@lru_cache
def _tried() -> str | None:
    try:
        import_inductor()
        with torch.no_grad():
            torch.compile(torch.relu, fullgraph=True, dynamic=True)(torch.zeros(32))
    except Exception as error:  # whatever a missing or broken compiler leads to
        reason = f"torch's Inductor cannot compile for this CPU ({str(error).strip().splitlines()[0]})"
        _logger.warning("mixtures are not fused: %s; a C++ compiler such as g++ makes them faster", reason)
        return reason
    return None


def forward(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    f: Names,
    g: Names,
) -> Tensor:
    """`eager.forward` for a (N, H), in one pass where that is faster and there is a compiler."""
    if not _pays(a):
        return eager.forward(a, b, gate_coef, up_coef, pair_coef, f, g)
    return _run(eager.forward_formula, (a, b, gate_coef, up_coef, pair_coef), f=f, g=g)[0]


def backward(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    grad: Tensor,
    f: Names,
    g: Names,
    with_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """`eager.backward` for a (N, H), as `forward`."""
    if not _pays(grad):
        return eager.backward(a, b, gate_coef, up_coef, pair_coef, grad, f, g, with_output)
    tensors = (a, b, gate_coef, up_coef, pair_coef, grad)
    return _run(eager.backward_formula, tensors, f=f, g=g, with_output=with_output)


def mixture(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    f: Names,
    g: Names,
) -> Tensor:
    """`eager.mixture`, differentiable; any leading shape in place of N."""
    tensors = (a, b, gate_coef, up_coef, pair_coef)
    rows = (None if t is None else t.reshape(-1, *t.shape[a.ndim - 1 :]) for t in tensors)
    return _Mixture.apply(*rows, f, g).view(a.shape)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        a, *_ = arguments
        out = forward(*arguments)
        return out.clone() if out is a else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.f, ctx.g = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        differentiate = eager.backward if torch.is_grad_enabled() else backward  # regions cannot be differentiated
        return (*differentiate(*ctx.saved_tensors, *grads, f=ctx.f, g=ctx.g), None, None)


def _pays(a: Tensor) -> bool:
    return a.numel() >= MIN_ELEMENTS and not is_intercepted(a) and unavailable_reason() is None


def _run(formula: Callable[..., Any], tensors: tuple[Tensor | None, ...], **settings: Any) -> Any:
    a, *_ = tensors
    assert a is not None
    region = _compiled(formula, a.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled(), **settings)
    return region(*(None if t is None else t.detach() for t in tensors))  # no autograd history to specialize on


@lru_cache(None)
def _compiled(
    formula: Callable[..., Any], dtype: torch.dtype, threads: int, inference: bool, **settings: Any
) -> Callable[..., Any]:
    """A region of its own for all that torch.compile would specialize on, so that its limit of recompilations, which
    counts for a code object, is never met.
    """

    def region(*tensors: Tensor | None) -> Any:
        return formula(*tensors, **settings)

    own = FunctionType(region.__code__.replace(), region.__globals__, region.__name__, None, region.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True)
