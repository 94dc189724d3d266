"""The CPU backend: the whole layer, projections included, by blocks of tokens.

Saved for the backward are x, a, b and the coefficients. The hidden activation and its gradient exist for one block at a
time, so they stay in the caches and their memory is reused. Plain torch saves the hidden activation of every token for
the gradient of down_proj.

Shapes: N tokens, D width, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ffn.backends import compiled, eager
from moa_ffn.coefficients import Coefficients
from moa_ffn.spec import Dictionaries
from moa_ffn.torch_internals import is_transformed

HIDDEN_ELEMENTS = 2**22
"""Elements of a or b in one block, 16 MiB in float32: large enough for matrix products at full rate, small enough for
glibc's allocator to keep the memory (it returns allocations of 32 MiB and more to the system)."""


class Weights(NamedTuple):
    """Projections: gate and up (H, D), down (D, H), each with its bias or None. Type-I has no up."""

    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Inputs(NamedTuple):
    """Everything that has a gradient: x (N, D), coefficients of N tokens, weights."""

    x: Tensor
    coefficients: Coefficients
    weights: Weights

    def flat(self) -> tuple[Any, ...]:
        """Return all tensors in one tuple, as autograd needs them."""
        return self.x, *self.coefficients, *self.weights

    @classmethod
    def unflatten(cls, tensors: Sequence[Any]) -> Inputs:
        """Return the inputs that `flat` flattened."""
        x, gate, up, pair, act, *weights = tensors
        return cls(x, Coefficients(gate, up, pair, act), Weights(*weights))


def ffn(x: Tensor, coefficients: Coefficients, weights: Weights, dictionaries: Dictionaries) -> Tensor:
    """Return down(sum_kl C_kl f_k(gate(x)) g_l(up(x))).

    Args:
        x: (..., D), float32 or float64 on a CPU.
        coefficients: Factors of C with x's leading shape.
        weights: The projections.
        dictionaries: Names of the activations f_k and g_l.

    Returns:
        (..., D) in x's dtype.
    """
    rows = coefficients.map(lambda c: c.reshape(-1, *c.shape[x.ndim - 1 :]))
    inputs = Inputs(x.reshape(-1, x.shape[-1]), rows, weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.flat()):
        out, *_ = _BlockwiseFFN.apply(*inputs.flat(), dictionaries)
    else:
        out, *_ = _forward(inputs, dictionaries, keep=False)
    return out.reshape(*x.shape[:-1], out.shape[-1])


class _BlockwiseFFN(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        *inputs, dictionaries = arguments
        return _forward(Inputs.unflatten(inputs), dictionaries, keep=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        *tensors, ctx.dictionaries = inputs
        _, a, b = output
        ctx.mark_non_differentiable(*(t for t in (a, b) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        *saved, a, b = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(saved) + 1)
        inputs, needed = Inputs.unflatten(saved), ctx.needs_input_grad[: len(saved)]
        if torch.is_grad_enabled() or is_transformed(grad):
            return *_differentiable_backward(grad, inputs, needed, ctx.dictionaries), None
        total = _gradient_buffers(inputs, needed)
        _backward(grad, inputs, a, b, ctx.dictionaries, total)
        return *total.flat(), None


def _forward(inputs: Inputs, dictionaries: Dictionaries, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output (N, D), and a and b: (N, H) if `keep`, else buffers of one block."""
    x, coefficients, weights = inputs
    blocks = _blocks(len(x), len(weights.gate))
    kept = len(x) if keep or not blocks else blocks[0].stop
    a = x.new_empty(kept, len(weights.gate))
    b = None if weights.up is None else torch.empty_like(a)
    out = x.new_empty(len(x), len(weights.down))
    for block in blocks:
        place = block if keep else slice(block.stop - block.start)
        _linear(x[block], weights.gate, weights.gate_bias, a[place])
        if b is not None and weights.up is not None:
            _linear(x[block], weights.up, weights.up_bias, b[place])
        rows = coefficients.map(lambda c, block=block: c[block])
        hidden = compiled.forward(a[place], None if b is None else b[place], rows, dictionaries)
        _linear(hidden, weights.down, weights.down_bias, out[block])
    return out, a, b


def _gradient_buffers(inputs: Inputs, needed: Sequence[bool]) -> Inputs:
    """Return uninitialized gradients, zero without tokens; None where a gradient is not needed."""
    new = torch.empty_like if len(inputs.x) else torch.zeros_like
    flat = zip(inputs.flat(), needed, strict=True)
    return Inputs.unflatten([new(t) if need and t is not None else None for t, need in flat])


def _backward(
    grad: Tensor, inputs: Inputs, a: Tensor, b: Tensor | None, dictionaries: Dictionaries, total: Inputs
) -> None:
    """Write the gradients of `inputs` into `total`."""
    weights, total_weights = inputs.weights, total.weights
    for block in _blocks(*a.shape):
        x, grad_out, first = inputs.x[block], grad[block], block.start == 0
        rows = inputs.coefficients.map(lambda c, block=block: c[block])
        b_rows = None if b is None else b[block]
        found = compiled.backward(grad_out @ weights.down, a[block], b_rows, rows, dictionaries, with_output=True)
        if total_weights.down is not None and found.output is not None:
            _accumulate(total_weights.down, grad_out.t(), found.output, first)
        for whole, part in zip(total.coefficients, found.coefficients, strict=True):
            if whole is not None and part is not None:
                whole[block] = part
        _linear_backward(total_weights.gate, total_weights.gate_bias, found.a, x, first)
        if found.b is not None:
            _linear_backward(total_weights.up, total_weights.up_bias, found.b, x, first)
        if total.x is not None:
            _accumulate(total.x[block], found.a, weights.gate, True)
            if found.b is not None and weights.up is not None:
                _accumulate(total.x[block], found.b, weights.up, False)
    if total_weights.down_bias is not None:
        torch.sum(grad, 0, out=total_weights.down_bias)


def _differentiable_backward(
    grad: Tensor, inputs: Inputs, needed: Sequence[bool], dictionaries: Dictionaries
) -> list[Tensor | None]:
    """Return the same gradients by autograd on plain operations, for higher derivatives and batched `grad` (vmap)."""
    create_graph = torch.is_grad_enabled()
    weights = inputs.weights
    with torch.enable_grad():
        a = F.linear(inputs.x, weights.gate, weights.gate_bias)
        b = None if weights.up is None else F.linear(inputs.x, weights.up, weights.up_bias)
        hidden = eager.mixture(a, b, inputs.coefficients, dictionaries)
        out = F.linear(hidden, weights.down, weights.down_bias)
    wanted = [need and t is not None for t, need in zip(inputs.flat(), needed, strict=True)]
    leaves = [t for t, want in zip(inputs.flat(), wanted, strict=True) if want]
    found = iter(torch.autograd.grad(out, leaves, grad, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]


def _blocks(tokens: int, hidden: int) -> list[slice]:
    """Return blocks of equal length, each of at most HIDDEN_ELEMENTS or of one token."""
    count = max(1, math.ceil(tokens * hidden / HIDDEN_ELEMENTS))
    size = max(1, math.ceil(tokens / count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _linear_backward(weight: Tensor | None, bias: Tensor | None, grad: Tensor, x: Tensor, first: bool) -> None:
    """Add one block's gradients of a projection to the totals `weight` and `bias`."""
    if weight is not None:
        _accumulate(weight, grad.t(), x, first)
    if bias is not None:
        bias.copy_(grad.sum(0)) if first else bias.add_(grad.sum(0))


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left @ right to `total`, or overwrite it with the first term of a sum."""
    if first:
        torch.mm(left, right, out=total)
    else:
        torch.addmm(total, left, right, out=total)
