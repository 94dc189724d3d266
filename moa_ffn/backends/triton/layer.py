"""The GPU backend: gate, up and mixing vectors in one matrix product, the mixture by fused kernels, then down_proj.

Saved for the backward are x and that product. The kernels recompute the hidden activation for the gradient of
down_proj, which plain torch saves.

Shapes: N tokens, D width, H hidden width, n mixing coefficients, W columns of the product: H, 2 H or 2 H + n, and
padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ffn.backends.triton import operators
from moa_ffn.backends.triton.source import Mixture
from moa_ffn.spec import FFNSpec

ALIGNMENT = 16
"""The product's columns are padded to a multiple of this, which vectorized loads and fast matrix products require."""


def ffn(
    x: Tensor,
    projections: Sequence[nn.Linear],
    mix: Tensor | None,
    act: Tensor | None,
    down: nn.Linear,
    spec: FFNSpec,
) -> Tensor:
    """Return down(mixture) where the kernels are available (`triton.unavailable_reason`).

    Args:
        x: (..., D).
        projections: Plain linear maps: gate, for Type-II up, for MoA the mixing vectors.
        mix: (n,) coefficients of LA variants, else None.
        act: (P,) parameters of trainable activations, or None.
        down: The last projection, plain.
        spec: The mixture.

    Returns:
        (..., D) in x's dtype or autocast's.
    """
    product = project(x, projections)
    flat = product.reshape(-1, product.shape[-1])
    weight = down.weight.to(product.dtype)
    bias = None if down.bias is None else down.bias.to(product.dtype)
    out = _Down.apply(flat, mix, act, weight, bias, Mixture.of(spec).key)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def project(x: Tensor, projections: Sequence[nn.Linear]) -> Tensor:
    """Return several linear maps of x (..., D) as one product (..., W), side by side, zero in the padding."""
    widths = [projection.out_features for projection in projections]
    padding = -sum(widths) % ALIGNMENT
    weights = [projection.weight for projection in projections]
    weight = F.pad(torch.cat(weights), (0, 0, 0, padding))
    if all(projection.bias is None for projection in projections):
        return F.linear(x, weight)
    biases = [weights[0].new_zeros(p.out_features) if p.bias is None else p.bias for p in projections]
    return F.linear(x, weight, F.pad(torch.cat(biases), (0, padding)))


class _Down(torch.autograd.Function):
    """down(mixture) of the product (N, W), in the weights' dtype."""

    @staticmethod
    def forward(
        product: Tensor, mix: Tensor | None, act: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str
    ) -> Tensor:
        return F.linear(operators.packed_mixture(product, mix, act, weight.shape[1], kind), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        product, mix, act, weight, _, ctx.kind = inputs
        ctx.save_for_backward(product, mix, act, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        product, mix, act, weight = ctx.saved_tensors
        *_, weight_needed, bias_needed, _ = ctx.needs_input_grad
        grad_product, grad_mix, grad_act, hidden = operators.packed_mixture_backward(
            grad @ weight, product, mix, act, weight.shape[1], weight_needed, ctx.kind
        )
        return (
            grad_product,
            None if mix is None else grad_mix,
            None if act is None else grad_act,
            grad.t() @ hidden if weight_needed else None,
            grad.sum(0) if bias_needed else None,
            None,
        )
