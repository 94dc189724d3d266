"""The formulas of the paper, written out: the ground truth of tests and the naive side of benchmarks.

Shapes: a, b (..., H); coefficients C (..., K1, K2), broadcastable over the token dimensions; result (..., H).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS


def mixture(a: Tensor, b: Tensor | None, coefficients: Tensor, f: Sequence[str], g: Sequence[str]) -> Tensor:
    """sum_kl C_kl f_k(a) g_l(b), the one formula of the family (arXiv:2605.26647); Type-I has b = None and K2 = 1.

    It stores all K1 * K2 terms, as a naive implementation does.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch, or None.
        coefficients: (..., K1, K2).
        f: names of the K1 activations of the gate branch.
        g: names of the K2 activations of the up branch; empty when b is None.
    """
    rows = torch.stack([ACTIVATIONS[name].function(a) for name in f], dim=-2)  # (..., K1, H)
    columns = torch.ones_like(a).unsqueeze(-2) if b is None else _stack(b, g)  # (..., K2, H)
    terms = rows.unsqueeze(-2) * columns.unsqueeze(-3)  # (..., K1, K2, H)
    return (coefficients.unsqueeze(-1) * terms).sum(dim=(-3, -2))


def _stack(x: Tensor, names: Sequence[str]) -> Tensor:
    return torch.stack([ACTIVATIONS[name].function(x) for name in names], dim=-2)


def gate_function(logits: Tensor, gate: str) -> Tensor:
    """Mixing coefficients from logits (..., K): sigmoid or tanh elementwise, softmax over the last dimension."""
    if gate == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if gate == "sigmoid" else logits.tanh()
