"""The eager backend: the factored sum in torch operations, with a backward that recomputes instead of storing.

Nothing of size K1 * K2 * H is built. Saved for the backward are a, b and the coefficients only; autograd on the plain
formula would keep every f_k(a), g_l(b) and partial sum. Shapes as in reference.py.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS
from moa_ffn.torch_internals import is_intercepted, is_transformed

Names = tuple[str, ...]

BLOCK_ELEMENTS = 2**17
"""Elements of a or b that one CPU thread takes at a time: half a MiB in float32, so that a mixture's temporaries
share the core's cache. Fixed FFNs have too few temporaries to gain from it.
"""


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
            shape; constant ones also without it in a transform or trace.
        f: names of the activations of the gate branch.
        g: names of the activations of the up branch.

    Returns:
        (..., H) in a's dtype.
    """
    if is_transformed(a):  # each has derivatives of its own, and compilers recompute what is cheap
        return forward_formula(a, b, gate_coef, up_coef, pair_coef, f=f, g=g)[0]
    return _Mixture.apply(a, b, gate_coef, up_coef, pair_coef, f, g)


def forward(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    f: Names,
    g: Names,
) -> Tensor:
    """`mixture` without autograd; the result may be `a` itself."""
    (out,) = _in_blocks(partial(forward_formula, f=f, g=g), a, b, gate_coef, up_coef, pair_coef)
    assert out is not None
    return out


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
    """Gradients of `mixture`'s five tensors for the gradient (..., H) of its result; and that result, if wanted: it
    costs little here, where its parts are at hand.
    """
    function = partial(backward_formula, f=f, g=g, with_output=with_output)
    return _in_blocks(function, a, b, gate_coef, up_coef, pair_coef, grad)


def _evaluate(x: Tensor, names: Names) -> list[Tensor]:
    return [ACTIVATIONS[name].function(x) for name in names]


def _blend(values: list[Tensor], coef: Tensor | None) -> Tensor:
    """sum_k coef_k values_k; values K times (..., H), coef (..., K) or None for a single fixed activation."""
    if coef is None:
        return values[0]
    weights = coef.unsqueeze(-1).unbind(-2)
    return _dot(values, (weights[k] for k in range(len(values))))  # by index: a proxy of torch.fx has no length


def _dot(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
    """sum_k xs_k ys_k, each (..., H) or (..., 1)."""
    pairs = zip(xs, ys, strict=True)
    x, y = next(pairs)
    total = x * y
    add = torch.addcmul if is_transformed(total) else Tensor.addcmul_  # in place of the temporary
    for x, y in pairs:
        total = add(total, x, y)
    return total


def _vjp(grads: Iterable[Tensor], x: Tensor, names: Names) -> Tensor:
    """sum_k grads_k sigma_k'(x), each (..., H); the grads are temporaries, the sum overwrites the first."""
    terms = (ACTIVATIONS[name].vjp(grad, x) for name, grad in zip(names, grads, strict=True))
    total = next(terms)
    add = torch.add if is_transformed(total) else Tensor.add_
    for term in terms:
        total = add(total, term)
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
        out = forward(a, b, gate_coef, up_coef, pair_coef, f, g)
        return out.clone() if out is a else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.f, ctx.g = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(*ctx.saved_tensors, *grads, f=ctx.f, g=ctx.g), None, None)


def _in_blocks(
    function: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`function` of a, b, coefficients and the rest, (..., *) each; mixtures on the CPU go by blocks of tokens."""
    x = tensors[0]
    assert x is not None
    mixed = any(coef is not None for coef in tensors[2:5])
    if not mixed or x.device.type != "cpu" or torch.is_grad_enabled() or is_intercepted(x):
        return function(*tensors)
    block = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // x.shape[-1])
    tokens = x.shape[:-1].numel()
    if tokens <= block:
        return function(*tensors)
    leading = x.ndim - 1
    flat = [None if t is None else t.reshape(tokens, *t.shape[leading:]) for t in tensors]
    results: list[Tensor | None] = []
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        parts = function(*(None if t is None else t[rows] for t in flat))
        results = results or [None if part is None else part.new_empty(tokens, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            if result is not None and part is not None:
                result[rows] = part
    return tuple(None if result is None else result.unflatten(0, x.shape[:-1]) for result in results)


def forward_formula(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    *,
    f: Names,
    g: Names,
) -> tuple[Tensor]:
    """The mixture itself, of all tokens at once."""
    rows = _evaluate(a, f)
    if b is None:
        return (_blend(rows, gate_coef),)
    columns = _evaluate(b, g)
    if pair_coef is None:
        return (_blend(rows, gate_coef) * _blend(columns, up_coef),)
    coefs = pair_coef.unbind(-2)
    return (_dot(rows, (_blend(columns, coefs[k]) for k in range(len(rows)))),)


def backward_formula(
    a: Tensor,
    b: Tensor | None,
    gate_coef: Tensor | None,
    up_coef: Tensor | None,
    pair_coef: Tensor | None,
    grad: Tensor,
    *,
    f: Names,
    g: Names,
    with_output: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the first five arguments, and the mixture itself if wanted."""
    rows = _evaluate(a, f) if with_output or gate_coef is not None or b is not None else []
    if b is None:
        grad_a, grad_gate = _branch_backward(grad, a, f, gate_coef, rows)
        output = (_blend(rows, gate_coef),) if with_output else ()
        return grad_a, None, grad_gate, None, None, *output
    columns = _evaluate(b, g)
    if pair_coef is None:
        row, column = _blend(rows, gate_coef), _blend(columns, up_coef)
        grad_a, grad_gate = _branch_backward(grad * column, a, f, gate_coef, rows)
        grad_b, grad_up = _branch_backward(grad * row, b, g, up_coef, columns)
        return grad_a, grad_b, grad_gate, grad_up, None, *((row * column,) if with_output else ())
    blends = [_blend(columns, coef) for coef in pair_coef.unbind(-2)]
    grad_a = _vjp((grad * blend for blend in blends), a, f)
    grad_b = _vjp((grad * _blend(rows, coef) for coef in pair_coef.unbind(-1)), b, g)
    output = (_dot(rows, blends),) if with_output else ()
    return grad_a, grad_b, None, None, _pair_grad(rows, [grad * column for column in columns]), *output


def _branch_backward(
    grad: Tensor, x: Tensor, names: Names, coef: Tensor | None, values: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of one branch's blend of `values` = sigma_k(x) with respect to x and its coefficients."""
    if coef is None:
        return ACTIVATIONS[names[0]].vjp(grad, x), None
    coef_grad = torch.stack([(grad * value).sum(-1) for value in values], dim=-1)
    weights = coef.unsqueeze(-1).unbind(-2)
    return _vjp((grad * weight for weight in weights), x, names), coef_grad


def _pair_grad(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """(..., K1, K2): sums over H of rows_k columns_l."""
    if torch.compiler.is_compiling():  # products and sums fuse with the rest of the backward; a matmul would not
        return torch.stack([torch.stack([(r * c).sum(-1) for c in columns], -1) for r in rows], -2)
    # Uncompiled, one batched product reads each operand once. Stacked along dim 0, which copies whole blocks.
    return torch.stack(rows).movedim(0, -2) @ torch.stack(columns).movedim(0, -1)
