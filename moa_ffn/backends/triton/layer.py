"""The GPU backend: gate, up and mixing vectors in one matrix product, the mixture by fused kernels, then down_proj.

Saved for the backward are x and that product; the kernels compute the activated tensor again for the gradient of
down_proj, where the plain form keeps it.

Shapes: N tokens, D width, H hidden width, n mixing coefficients, W = H, 2 H or 2 H + n and padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ffn.backends import triton as kernels
from moa_ffn.spec import FFNSpec

ALIGNMENT = 16
"""The product's columns are padded to a multiple of it: Triton vectorizes loads from rows that begin at such,
and fast products ask for them."""


def ffn(x: Tensor, projections: Sequence[nn.Linear], mix: Tensor | None, down: nn.Linear, spec: FFNSpec) -> Tensor:
    """down(mixture) of x (..., D), where the kernels can run (`triton.unavailable_reason`).

    Args:
        x: (..., D).
        projections: of the gate branch, for Type-II of the up branch, for MoA the mixing vectors: plain linear maps.
        mix: (n,) constant coefficients of LA variants, else None.
        down: the last projection, plain.
        spec: which mixture.

    Returns:
        (..., D) in x's dtype or autocast's.
    """
    product = project(x, projections)
    flat = product.reshape(-1, product.shape[-1])
    weight = down.weight.to(product.dtype)
    bias = None if down.bias is None else down.bias.to(product.dtype)
    out = _Down.apply(flat, mix, weight, bias, down.in_features, spec)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def project(x: Tensor, projections: Sequence[nn.Linear]) -> Tensor:
    """Several linear maps of x (..., D) in one product (..., W), side by side; the padding's columns are zero."""
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
        product: Tensor, mix: Tensor | None, weight: Tensor, bias: Tensor | None, hidden_dim: int, spec: FFNSpec
    ) -> Tensor:
        return F.linear(kernels.packed_mixture(product, mix, hidden_dim, spec), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        product, mix, weight, _, ctx.hidden_dim, ctx.spec = inputs
        ctx.save_for_backward(product, mix, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        product, mix, weight = ctx.saved_tensors
        *_, weight_needed, bias_needed, _, _ = ctx.needs_input_grad
        found = kernels.packed_mixture_backward(
            grad @ weight, product, mix, ctx.hidden_dim, ctx.spec, with_output=weight_needed
        )
        grad_weight = grad.t() @ found.output if found.output is not None else None
        return found.projected, found.mix, grad_weight, grad.sum(0) if bias_needed else None, None, None
