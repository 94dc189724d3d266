"""The formula of the paper, written out: the ground truth of tests and the naive side of benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS, split_parameters
from moa_ffn.spec import Dictionaries

if TYPE_CHECKING:
    from moa_ffn.layers import FFN


def mixture(
    a: Tensor, b: Tensor | None, matrix: Tensor, dictionaries: Dictionaries, act: Tensor | None = None
) -> Tensor:
    """Return sum_kl C_kl f_k(a) g_l(b) (arXiv:2605.26647), with all K1 * K2 terms in memory.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch, or None for Type-I, where K2 = 1.
        matrix: (..., K1, K2) coefficients C, broadcastable over tokens.
        dictionaries: Names of the activations f_k and g_l.
        act: (P,) parameters of trainable activations.
    """

    def values(x: Tensor, names: tuple[str, ...], parameters: list[tuple[Tensor, ...]]) -> Tensor:
        pairs = zip(names, parameters, strict=True)
        return torch.stack([ACTIVATIONS[name].function(x, *given) for name, given in pairs], dim=-2)

    gate_parameters, up_parameters = split_parameters(act, *dictionaries)
    rows = values(a, dictionaries.gate, gate_parameters)  # (..., K1, H)
    columns = torch.ones_like(a).unsqueeze(-2) if b is None else values(b, dictionaries.up, up_parameters)
    terms = rows.unsqueeze(-2) * columns.unsqueeze(-3)  # (..., K1, K2, H)
    return (matrix.unsqueeze(-1) * terms).sum(dim=(-3, -2))


def ffn(layer: FFN, x: Tensor) -> Tensor:
    """Return what `layer` computes for x (..., D), by `mixture`."""
    b = None if layer.up_proj is None else layer.up_proj(x)
    hidden = mixture(layer.gate_proj(x), b, layer.mixing(x), layer.spec.dictionaries, layer.act_param)
    return layer.down_proj(hidden)
