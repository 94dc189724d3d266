"""Liger's fused SwiGLU (linkedin/Liger-Kernel), a peer where it is installed."""

import importlib.util

import torch
from torch import Tensor


def liger_unavailable_reason(device: torch.device) -> str | None:
    """Why it cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None if device.type == "cuda" else f"Liger's kernels need a GPU, not {device.type}"


def silu_mul(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, (..., H) each. Its backward overwrites a and b."""
    module = importlib.import_module("liger_kernel.ops.swiglu")
    return module.LigerSiLUMulFunction.apply(a, b)
