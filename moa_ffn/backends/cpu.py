"""The CPU backend: the whole layer, projections included, for one block of tokens after the other.

Saved for the backward are x, a, b and the coefficients. The hidden activation and its gradient exist for one block at
a time, so that they stay in the caches and their memory is reused; the plain form keeps the activation of every token
for the gradient of down_proj, and asks the system for fresh pages in every call.

Shapes: N tokens, D width, H hidden width; coefficients as in eager.py.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ffn.backends import compiled, eager
from moa_ffn.backends.eager import Names
from moa_ffn.torch_internals import is_transformed

HIDDEN_ELEMENTS = 2**22
"""Elements of a or b in one block: 16 MiB in float32. Large enough for matrix products at full rate, small enough for
glibc's allocator to keep the memory (it returns pieces of 32 MiB and more to the system at once)."""


class Inputs(NamedTuple):
    """Everything that has a gradient. x (N, D); coefficients gate (N, K1), up (N, K2), pair (N, K1, K2), None where
    the form has none; weights w_gate and w_up (H, D), w_down (D, H) with their biases; no w_up for Type-I.
    """

    x: Tensor
    gate: Tensor | None
    up: Tensor | None
    pair: Tensor | None
    w_gate: Tensor
    b_gate: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None


PER_TOKEN = 4
"""The first fields of `Inputs` hold one row a token; the others are sums over tokens in the backward."""


def ffn(inputs: Inputs, f: Names, g: Names) -> Tensor:
    """down(sum_kl C_kl f_k(a) g_l(b)) with a = gate(x), b = up(x).

    Args:
        inputs: with any leading shape in place of N, float32 or float64 on a CPU.
        f, g: names of the activations of the gate and of the up branch.

    Returns:
        (..., D) in x's dtype.
    """
    x = inputs.x
    per_token: list[Any] = [t if t is None else t.reshape(-1, *t.shape[x.ndim - 1 :]) for t in inputs[:PER_TOKEN]]
    flat = Inputs._make([*per_token, *inputs[PER_TOKEN:]])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        out, *_ = _BlockwiseFFN.apply(*flat, f, g)
    else:
        out, *_ = _forward(flat, f, g, keep=False)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _blocks(tokens: int, hidden: int) -> list[slice]:
    """Blocks of equal length with at most HIDDEN_ELEMENTS each, or of one token."""
    count = max(1, math.ceil(tokens * hidden / HIDDEN_ELEMENTS))
    size = max(1, math.ceil(tokens / count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _rows(rows: slice, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t[rows] for t in tensors]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _forward(inputs: Inputs, f: Names, g: Names, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (N, D), and a and b: (N, H) if kept, else of the last block."""
    x, w_gate, w_up = inputs.x, inputs.w_gate, inputs.w_up
    blocks = _blocks(len(x), len(w_gate))
    kept = len(x) if keep or not blocks else blocks[0].stop
    a = x.new_empty(kept, len(w_gate))
    b = None if w_up is None else torch.empty_like(a)
    out = x.new_empty(len(x), len(inputs.w_down))
    for block in blocks:
        place = block if keep else slice(block.stop - block.start)
        _linear(x[block], w_gate, inputs.b_gate, a[place])
        if b is not None and w_up is not None:
            _linear(x[block], w_up, inputs.b_up, b[place])
        hidden = compiled.forward(*_rows(place, a, b), *_rows(block, *inputs[1:PER_TOKEN]), f=f, g=g)
        _linear(hidden, inputs.w_down, inputs.b_down, out[block])
    return out, a, b


class _BlockwiseFFN(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        *inputs, f, g = arguments
        return _forward(Inputs(*inputs), f, g, keep=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        *tensors, ctx.f, ctx.g = inputs
        _, a, b = output
        ctx.mark_non_differentiable(*(t for t in (a, b) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        *saved, a, b = ctx.saved_tensors
        inputs, needed = Inputs(*saved), ctx.needs_input_grad[: len(saved)]
        if grad is None:
            return (None,) * (len(saved) + 2)
        if torch.is_grad_enabled() or is_transformed(grad):
            return (*_differentiable_backward(inputs, needed, grad, ctx.f, ctx.g), None, None)
        return (*_backward(inputs, needed, a, b, grad, ctx.f, ctx.g), None, None)


def _backward(
    inputs: Inputs,
    needed: Sequence[bool],
    a: Tensor,
    b: Tensor | None,
    grad: Tensor,
    f: Names,
    g: Names,
) -> Inputs:
    """Gradients of `inputs`; None where it is not needed."""
    new = torch.empty_like if len(a) else torch.zeros_like
    candidates: Any = zip(needed, inputs, strict=True)
    total: Any = Inputs._make(new(t) if need and t is not None else None for need, t in candidates)
    for block in _blocks(*a.shape):
        x, grad_out, first = inputs.x[block], grad[block], block.start == 0
        parts = _rows(block, a, b, *inputs[1:PER_TOKEN])
        results: Any = compiled.backward(*parts, grad=grad_out @ inputs.w_down, f=f, g=g, with_output=True)
        grad_a, grad_b, *grad_coefs, hidden = results
        if total.w_down is not None:
            _accumulate(total.w_down, grad_out.t(), hidden, first)
        for whole, part in zip(total[1:PER_TOKEN], grad_coefs, strict=True):
            if whole is not None:
                whole[block] = part
        _linear_backward(total.w_gate, total.b_gate, grad_a, x, first)
        _linear_backward(total.w_up, total.b_up, grad_b, x, first)
        if total.x is not None:
            _accumulate(total.x[block], grad_a, inputs.w_gate, True)
            if inputs.w_up is not None:
                _accumulate(total.x[block], grad_b, inputs.w_up, False)
    if total.b_down is not None:
        torch.sum(grad, 0, out=total.b_down)
    return total


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, or total = left @ right for the first term of a sum."""
    if first:
        torch.mm(left, right, out=total)
    else:
        torch.addmm(total, left, right, out=total)


def _linear_backward(
    w_total: Tensor | None, b_total: Tensor | None, grad: Tensor | None, x: Tensor, first: bool
) -> None:
    if grad is None:
        return
    if w_total is not None:
        _accumulate(w_total, grad.t(), x, first)
    if b_total is not None:
        b_total.copy_(grad.sum(0)) if first else b_total.add_(grad.sum(0))


def _differentiable_backward(
    inputs: Inputs, needed: Sequence[bool], grad: Tensor, f: Names, g: Names
) -> list[Tensor | None]:
    """The same gradients by autograd on the plain form: for higher derivatives, and for batches of `grad` (vmap)."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        a = F.linear(inputs.x, inputs.w_gate, inputs.b_gate)
        b = None if inputs.w_up is None else F.linear(inputs.x, inputs.w_up, inputs.b_up)
        out = F.linear(eager.mixture(a, b, *inputs[1:PER_TOKEN], f=f, g=g), inputs.w_down, inputs.b_down)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return [next(found) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)]
