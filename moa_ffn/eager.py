"""The eager backend: the factored sum in torch operations, with a backward that recomputes instead of storing.

Nothing of size K1 * K2 * H is built. Saved for the backward are a, b and the coefficients only; autograd on the plain
formula would keep every f_k(a), g_l(b) and partial sum. Shapes as in reference.py.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS

Names = tuple[str, ...]


def mixture(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    f: Names,
    g: Names,
) -> Tensor:
    """sum_kl C_kl f_k(a) g_l(b) with C = pair_coef, or C = gate_coef up_coef^T.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch, or None for Type-I.
        gate_coef: (..., K1), or None when the gate branch is fixed (K1 = 1).
        up_coef: (..., K2), or None when the up branch is fixed (K2 = 1) or absent.
        pair_coef: (..., K1, K2), or None for the separable forms. All coefficients in a's dtype, with a's leading
            shape.
        f: names of the activations of the gate branch.
        g: names of the activations of the up branch.

    Returns:
        (..., H) in a's dtype.
    """
    return _Mixture.apply(a, b, gate_coef, up_coef, pair_coef, f, g)


def _evaluate(x: Tensor, names: Names) -> list[Tensor]:
    return [ACTIVATIONS[name].function(x) for name in names]


def _blend(values: list[Tensor], coef: Tensor | None) -> Tensor:
    """sum_k coef_k values_k; values K times (..., H), coef (..., K) or None for a single fixed activation."""
    if coef is None:
        return values[0]
    weights = coef.unsqueeze(-1).unbind(-2)
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total.addcmul_(value, weight)
    return total


def _vjp(grads: Iterable[Tensor], x: Tensor, names: Names) -> Tensor:
    """sum_k grads_k sigma_k'(x), each (..., H); the grads are temporaries, the sum overwrites the first."""
    terms = (ACTIVATIONS[name].vjp(grad, x) for name, grad in zip(names, grads, strict=True))
    total = next(terms)
    for term in terms:
        total = total.add_(term)
    return total


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor | None,
        gate_coef: Tensor | None,
        up_coef: Tensor | None,
        pair_coef: Tensor | None,
        f: Names,
        g: Names,
    ) -> Tensor:
        rows = _evaluate(a, f)
        if b is None:
            out = _blend(rows, gate_coef)
        elif pair_coef is None:
            out = _blend(rows, gate_coef) * _blend(_evaluate(b, g), up_coef)
        else:
            columns = _evaluate(b, g)
            out = torch.zeros_like(a)
            for row, coef in zip(rows, pair_coef.unbind(-2), strict=True):
                out = out.addcmul_(row, _blend(columns, coef))
        return out.clone() if out is a else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.f, ctx.g = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        a, b, gate_coef, up_coef, pair_coef = ctx.saved_tensors
        if b is None:
            results = (*_branch_backward(grad, a, ctx.f, gate_coef), None, None)
            return results[0], None, results[1], None, None, None, None
        if pair_coef is None:
            results = _separable_backward(grad, a, b, gate_coef, up_coef, ctx.f, ctx.g)
        else:
            results = _full_backward(grad, a, b, pair_coef, ctx.f, ctx.g)
        return (*results, None, None)


def _branch_backward(grad: Tensor, x: Tensor, names: Names, coef: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of one branch's blend with respect to x and its coefficients."""
    if coef is None:
        return ACTIVATIONS[names[0]].vjp(grad, x), None
    coef_grad = torch.stack([(grad * value).sum(-1) for value in _evaluate(x, names)], dim=-1)
    weights = coef.unsqueeze(-1).unbind(-2)
    return _vjp((grad * weight for weight in weights), x, names), coef_grad


def _separable_backward(
    grad: Tensor, a: Tensor, b: Tensor, gate_coef: Tensor | None, up_coef: Tensor | None, f: Names, g: Names
) -> tuple[Tensor | None, ...]:
    row_grad = grad * _blend(_evaluate(b, g), up_coef)
    column_grad = grad * _blend(_evaluate(a, f), gate_coef)
    grad_a, grad_gate = _branch_backward(row_grad, a, f, gate_coef)
    grad_b, grad_up = _branch_backward(column_grad, b, g, up_coef)
    return grad_a, grad_b, grad_gate, grad_up, None


def _full_backward(
    grad: Tensor, a: Tensor, b: Tensor, pair_coef: Tensor, f: Names, g: Names
) -> tuple[Tensor | None, ...]:
    rows, columns = _evaluate(a, f), _evaluate(b, g)
    grad_a = _vjp((grad * _blend(columns, coef) for coef in pair_coef.unbind(-2)), a, f)
    grad_b = _vjp((grad * _blend(rows, coef) for coef in pair_coef.unbind(-1)), b, g)
    return grad_a, grad_b, None, None, _pair_grad(rows, [grad * column for column in columns])


def _pair_grad(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """(..., K1, K2): sums over H of rows_k columns_l."""
    if torch.compiler.is_compiling():  # products and sums fuse with the rest of the backward; a matmul would not
        return torch.stack([torch.stack([(r * c).sum(-1) for c in columns], -1) for r in rows], -2)
    # Uncompiled, one batched product reads each operand once. Stacked along dim 0, which copies whole blocks.
    return torch.stack(rows).movedim(0, -2) @ torch.stack(columns).movedim(0, -1)
