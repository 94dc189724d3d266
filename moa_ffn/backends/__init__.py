"""Backends of the layer and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moa_ffn.backends import triton
from moa_ffn.spec import FFNSpec
from moa_ffn.torch_internals import has_hooks, is_intercepted, is_transformed

_logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "cpu", "eager")

CPU_DTYPES = (torch.float32, torch.float64)
"""Dtypes of the CPU backend. Half precision would be rounded once per block of tokens."""


def select_backend(
    backend: str, x: Tensor, spec: FFNSpec, linears: Sequence[nn.Module | None] = (), dropout: bool = False
) -> str:
    """Return the name of the backend that computes `spec`.

    Args:
        backend: One of `BACKENDS`. "auto" selects the fastest available one, and plain torch operations ("eager") in
            exported programs, which then run without this package, and under tracers, transforms and modes.
        x: (..., D) input of a layer, or (..., H) branch of a bare mixture.
        spec: The mixture.
        linears: The layer's projections; empty for a bare mixture.
        dropout: Whether dropout is active inside the layer.

    Raises:
        ValueError: The requested backend is unavailable; the message gives the reason.
    """
    if backend != "auto":
        reason = unavailable_reason(backend, x, spec, linears, dropout)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run: {reason}; use backend='auto'")
        return backend
    if is_transformed(x) and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
        return "eager"
    fastest = "triton" if x.is_cuda else "cpu"
    reason = unavailable_reason(fastest, x, spec, linears, dropout)
    if reason is not None and fastest == "triton" and not torch.compiler.is_compiling():
        _warn_once(f"mixtures are not fused on this GPU: {reason}")
    return "eager" if reason else fastest


def unavailable_reason(
    backend: str, x: Tensor, spec: FFNSpec, linears: Sequence[nn.Module | None] = (), dropout: bool = False
) -> str | None:
    """Return why `backend` cannot compute `spec`, or None. Arguments as for `select_backend`."""
    if backend == "eager":
        return None
    if is_transformed(x) and not torch.compiler.is_compiling():
        return "the layer is being traced or transformed (torch.fx, torch.jit, torch.func, forward-mode AD)"
    if backend == "triton":
        return triton.unavailable_reason(x, spec)
    if torch.compiler.is_compiling():
        return "under torch.compile the plain operations fuse better"
    if is_intercepted(x):
        return f"x is a {type(x).__name__}, or a torch dispatch or function mode is active"
    if x.device.type != "cpu" or x.dtype not in CPU_DTYPES or torch.is_autocast_enabled("cpu"):
        return f"it needs float32 or float64 on a CPU without autocast, not {x.dtype} on {x.device.type}"
    if dropout:
        return "dropout is active inside the layer"
    if not all(is_plain(linear, x.dtype) for linear in linears):
        return f"a projection is not a plain nn.Linear of {x.dtype} without hooks"
    return None


def is_plain(linear: nn.Module | None, dtype: torch.dtype | None = None) -> bool:
    """Return whether `linear` is absent or a linear map by its weight (of `dtype`, if given) and bias alone.

    A backend may then use weight and bias directly.
    """
    return linear is None or (
        type(linear) is nn.Linear
        and not has_hooks(linear)
        and "forward" not in vars(linear)  # accelerate's offloading replaces it
        and type(linear.weight) in (Tensor, nn.Parameter, FakeTensor)
        and dtype in (None, linear.weight.dtype)
    )


@lru_cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
