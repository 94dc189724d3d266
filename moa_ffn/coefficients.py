"""Mixing coefficients in factored form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ffn.activations import ACTIVATIONS
from moa_ffn.spec import FFNSpec


class Coefficients(NamedTuple):
    """Factors of the coefficient matrix C (..., K1, K2): `pair`, or the outer product of `gate` and `up`.

    gate (..., K1), up (..., K2), pair (..., K1, K2); act (..., P) are the parameters of trainable activations, gate
    branch first. What the variant does not have is None.
    """

    gate: Tensor | None = None
    up: Tensor | None = None
    pair: Tensor | None = None
    act: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Coefficients:
        """Return the factors with `function` applied to each."""
        return Coefficients(*(None if factor is None else function(factor) for factor in self))

    def matrix(self, like: Tensor) -> Tensor:
        """Return C (..., K1, K2) for tokens `like` (..., D); the factor of a fixed branch is 1."""
        if self.pair is not None:
            return self.pair
        one = like.new_ones(*like.shape[:-1], 1)
        gate, up = (one if factor is None else factor for factor in (self.gate, self.up))
        return gate.unsqueeze(-1) * up.unsqueeze(-2)


def gate_function(logits: Tensor, gate: str) -> Tensor:
    """Return mixing coefficients for logits (..., K): sigmoid or tanh elementwise, or softmax over K."""
    if gate == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if gate == "sigmoid" else logits.tanh()


@torch.no_grad()
def init_mixing(
    spec: FFNSpec,
    mix_proj: Tensor | None = None,
    mix_coef: Tensor | None = None,
    act_param: Tensor | None = None,
    *,
    std: float,
    coef: float,
) -> None:
    """Initialize mixing vectors (..., n, D), LA coefficients (..., n) and parameters (P,) of activations in place.

    An anchored mixture starts with zero vectors, or with the coefficients of its anchor.
    """
    if mix_proj is not None:
        nn.init.normal_(mix_proj, std=0.0 if spec.anchored else std)
    if mix_coef is not None:
        nn.init.constant_(mix_coef, 0.0 if spec.anchored else coef)
        mix_coef[..., list(spec.anchor_coefficients)] = 1.0
    if act_param is not None:
        initial = [value for names in spec.dictionaries for name in names for value in ACTIVATIONS[name].parameters]
        act_param.copy_(torch.tensor(initial))


def mixing_coefficients(spec: FFNSpec, mix: Tensor) -> Coefficients:
    """Return the factored coefficients for `mix` (..., n): logits of MoA variants, coefficients of LA variants."""
    k1, k2 = len(spec.gate_dictionary), len(spec.up_dictionary)

    def factor(first: int, count: int) -> Tensor:
        logits = mix.narrow(-1, first, count)
        if not spec.token_adaptive:
            return logits
        values = gate_function(logits, spec.mixing_gate)
        one = [index - first for index in spec.anchor_coefficients if first <= index < first + count]
        return _anchored(values, one[0], spec.mixing_gate) if one else values

    match spec.form:
        case "gate":
            return Coefficients(gate=factor(0, k1))
        case "up":
            return Coefficients(up=factor(0, k2))
        case "separable":
            return Coefficients(gate=factor(0, k1), up=factor(k1, k2))
        case "full":
            return Coefficients(pair=factor(0, k1 * k2).unflatten(-1, (k1, k2)))
        case _:
            return Coefficients()


def _anchored(values: Tensor, one: int, gate: str) -> Tensor:
    """Return values (..., K) - gate(0) + onehot, exactly one-hot where `values` are gate(0)."""
    count = values.shape[-1]
    at_zero = gate_function(values.new_zeros(count), gate)  # in the same dtype, so that the difference is exact
    onehot = F.pad(values.new_ones(1), (one, count - 1 - one))
    return values - at_zero + onehot
