"""The formula of the paper, written out: the ground truth of tests and the naive side of benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS
from moa_ffn.spec import Dictionaries

if TYPE_CHECKING:
    from moa_ffn.layers import FFN


def mixture(a: Tensor, b: Tensor | None, matrix: Tensor, dictionaries: Dictionaries) -> Tensor:
    """Return sum_kl C_kl f_k(a) g_l(b) (arXiv:2605.26647), with all K1 * K2 terms in memory.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch, or None for Type-I, where K2 = 1.
        matrix: (..., K1, K2) coefficients C, broadcastable over tokens.
        dictionaries: Names of the activations f_k and g_l.
    """
    rows = torch.stack([ACTIVATIONS[name].function(a) for name in dictionaries.gate], dim=-2)  # (..., K1, H)
    if b is None:
        columns = torch.ones_like(a).unsqueeze(-2)
    else:
        columns = torch.stack([ACTIVATIONS[name].function(b) for name in dictionaries.up], dim=-2)  # (..., K2, H)
    terms = rows.unsqueeze(-2) * columns.unsqueeze(-3)  # (..., K1, K2, H)
    return (matrix.unsqueeze(-1) * terms).sum(dim=(-3, -2))


def ffn(layer: FFN, x: Tensor) -> Tensor:
    """Return what `layer` computes for x (..., D), by `mixture`."""
    b = None if layer.up_proj is None else layer.up_proj(x)
    return layer.down_proj(mixture(layer.gate_proj(x), b, layer.mixing(x), layer.spec.dictionaries))
