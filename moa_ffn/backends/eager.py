"""The eager backend: the factored sum in torch operations, with a backward that recomputes activations.

Saved for the backward are a, b and the coefficients. Autograd on the plain formula would save every f_k(a), g_l(b) and
partial sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS, split_parameters
from moa_ffn.coefficients import Coefficients
from moa_ffn.spec import Dictionaries
from moa_ffn.torch_internals import is_intercepted, is_transformed

Tensors = tuple[Tensor | None, ...]

BLOCK_ELEMENTS = 2**17
"""Elements of a or b per CPU thread and block: half a MiB in float32, so that temporaries stay in the core's cache."""


class Gradients(NamedTuple):
    """Gradients of a mixture's inputs, None where there is no input, and the mixture itself if requested."""

    a: Tensor
    b: Tensor | None
    coefficients: Coefficients
    output: Tensor | None = None


def mixture(a: Tensor, b: Tensor | None, coefficients: Coefficients, dictionaries: Dictionaries) -> Tensor:
    """Return sum_kl C_kl f_k(a) g_l(b).

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch, or None for Type-I.
        coefficients: Factors of C in a's dtype with a's leading shape. In a transform or trace, constant factors may
            lack the leading shape.
        dictionaries: Names of the activations f_k and g_l.

    Returns:
        (..., H) in a's dtype.
    """
    if is_transformed(a):  # transforms differentiate plain operations themselves; compilers choose what to recompute
        return forward_formula(a, b, coefficients, dictionaries)
    return MixtureFunction.apply(a, b, *coefficients, dictionaries, forward, backward)


def forward(a: Tensor, b: Tensor | None, coefficients: Coefficients, dictionaries: Dictionaries) -> Tensor:
    """Return `mixture` without autograd; the result may be `a` itself."""
    formula = partial(flat_forward, dictionaries=dictionaries)
    (out,) = _in_blocks(formula, coefficients, a, b, *coefficients)
    assert out is not None
    return out


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    coefficients: Coefficients,
    dictionaries: Dictionaries,
    with_output: bool = False,
) -> Gradients:
    """Return the gradients of `mixture` for the gradient (..., H) of its result, and optionally the result.

    The result costs little here because its parts are computed anyway.
    """
    formula = partial(flat_backward, dictionaries=dictionaries, with_output=with_output)
    return unflatten(_in_blocks(formula, coefficients, grad, a, b, *coefficients))


class MixtureFunction(torch.autograd.Function):
    """The mixture with a backward that recomputes; arguments: a, b, the factors, dictionaries, forward, backward."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, *arguments: Any) -> Tensor:
        """Return the mixture, never `a` itself."""
        *factors, dictionaries, forward, _ = arguments
        out = forward(a, b, Coefficients(*factors), dictionaries)
        return out.clone() if out is a else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs."""
        *tensors, ctx.dictionaries, _, ctx.differentiate = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensors:
        """Return the gradients of a, b and the factors."""
        (grad,) = grads
        a, b, *factors = ctx.saved_tensors
        found = ctx.differentiate(grad, a, b, Coefficients(*factors), ctx.dictionaries)
        return found.a, found.b, *found.coefficients, None, None, None


def forward_formula(a: Tensor, b: Tensor | None, coefficients: Coefficients, dictionaries: Dictionaries) -> Tensor:
    """Return the mixture of all tokens at once."""
    gate, up, pair, act = coefficients
    gate_parameters, up_parameters = split_parameters(act, *dictionaries)
    rows = _evaluate(a, dictionaries.gate, gate_parameters)
    if b is None:
        return _blend(rows, gate)
    columns = _evaluate(b, dictionaries.up, up_parameters)
    if pair is None:
        return _blend(rows, gate) * _blend(columns, up)
    pair_rows = pair.unbind(-2)
    return _dot(rows, (_blend(columns, pair_rows[k]) for k in range(len(rows))))


def backward_formula(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    coefficients: Coefficients,
    dictionaries: Dictionaries,
    with_output: bool,
) -> Gradients:
    """Return the gradients of all tokens at once."""
    gate, up, pair, act = coefficients
    gate_parameters, up_parameters = split_parameters(act, *dictionaries)
    f = _Branch(a, dictionaries.gate, gate_parameters)
    rows = f.values() if with_output or gate is not None or b is not None else []
    if b is None:
        grad_a, grad_gate, grad_act = f.backward(grad, gate, rows)
        found = Coefficients(gate=grad_gate, act=_stack(grad_act))
        return Gradients(grad_a, None, found, _blend(rows, gate) if with_output else None)
    g = _Branch(b, dictionaries.up, up_parameters)
    columns = g.values()
    if pair is None:
        row, column = _blend(rows, gate), _blend(columns, up)
        grad_a, grad_gate, gate_act = f.backward(grad * column, gate, rows)
        grad_b, grad_up, up_act = g.backward(grad * row, up, columns)
        found = Coefficients(grad_gate, grad_up, act=_stack(gate_act + up_act))
        return Gradients(grad_a, grad_b, found, row * column if with_output else None)
    blends = [_blend(columns, coef) for coef in pair.unbind(-2)]
    grad_a, gate_act = f.vjp(grad * blend for blend in blends)
    grad_b, up_act = g.vjp(grad * _blend(rows, coef) for coef in pair.unbind(-1))
    grad_pair = _pair_grad(rows, [grad * column for column in columns])
    found = Coefficients(pair=grad_pair, act=_stack(gate_act + up_act))
    return Gradients(grad_a, grad_b, found, _dot(rows, blends) if with_output else None)


class _Branch(NamedTuple):
    """One branch x (..., H) with its dictionary and the parameters of each activation."""

    x: Tensor
    names: tuple[str, ...]
    parameters: list[tuple[Tensor, ...]]

    def values(self) -> list[Tensor]:
        return _evaluate(*self)

    def vjp(self, grads: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return sum_k grads_k sigma_k'(x) for temporaries grads_k, and the gradients of all parameters."""
        total: Tensor | None = None
        act_grads: list[Tensor] = []
        add = torch.add if is_transformed(self.x) else Tensor.add_  # the first temporary holds the sum
        for name, parameters, grad in zip(self.names, self.parameters, grads, strict=True):
            act_grads += ACTIVATIONS[name].parameter_vjp(grad, self.x, *parameters)
            term = ACTIVATIONS[name].vjp(grad, self.x, *parameters)
            total = term if total is None else add(total, term)
        assert total is not None
        return total, act_grads

    def backward(
        self, grad: Tensor, coef: Tensor | None, values: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return the gradients of x, `coef` and the parameters through the blend of `values` = sigma_k(x)."""
        if coef is None:
            (name,), (parameters,) = self.names, self.parameters
            entry = ACTIVATIONS[name]
            return entry.vjp(grad, self.x, *parameters), None, entry.parameter_vjp(grad, self.x, *parameters)
        coef_grad = torch.stack([(grad * value).sum(-1) for value in values], dim=-1)
        weights = coef.unsqueeze(-1).unbind(-2)
        grad_x, act_grads = self.vjp(grad * weight for weight in weights)
        return grad_x, coef_grad, act_grads


def flat_forward(*tensors: Any, dictionaries: Dictionaries) -> tuple[Tensor]:
    """Apply `forward_formula` to a, b and the coefficients."""
    a, b, *factors = tensors
    return (forward_formula(a, b, Coefficients(*factors), dictionaries),)


def flat_backward(*tensors: Any, dictionaries: Dictionaries, with_output: bool) -> Tensors:
    """Apply `backward_formula` to grad, a, b and the coefficients; `unflatten` restores its result."""
    grad, a, b, *factors = tensors
    found = backward_formula(grad, a, b, Coefficients(*factors), dictionaries, with_output)
    return found.a, found.b, *found.coefficients, found.output


def unflatten(tensors: Any) -> Gradients:
    """Return the `Gradients` that `flat_backward` flattened."""
    a, b, *factors, output = tensors
    return Gradients(a, b, Coefficients(*factors), output)


def _in_blocks(function: Callable[..., Tensors], coefficients: Coefficients, *tensors: Tensor | None) -> Tensors:
    """Apply `function` to (..., *) tensors, on a CPU by blocks of tokens that fit the caches.

    Fixed variants have too few temporaries to gain from blocks.
    """
    x = tensors[0]
    assert x is not None
    fixed = all(factor is None for factor in coefficients)
    if fixed or x.device.type != "cpu" or torch.is_grad_enabled() or is_intercepted(x):
        return function(*tensors)
    block = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // x.shape[-1])
    tokens = x.shape[:-1].numel()
    if tokens <= block:
        return function(*tensors)
    flat = [None if t is None else t.reshape(tokens, *t.shape[x.ndim - 1 :]) for t in tensors]
    results: list[Tensor | None] = []
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        parts = function(*(None if t is None else t[rows] for t in flat))
        results = results or [None if part is None else part.new_empty(tokens, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            if result is not None and part is not None:
                result[rows] = part
    return tuple(None if result is None else result.unflatten(0, x.shape[:-1]) for result in results)


def _evaluate(x: Tensor, names: tuple[str, ...], parameters: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [ACTIVATIONS[name].function(x, *given) for name, given in zip(names, parameters, strict=True)]


def _stack(values: list[Tensor]) -> Tensor | None:
    return torch.stack(values, -1) if values else None


def _blend(values: list[Tensor], coef: Tensor | None) -> Tensor:
    """Return sum_k coef_k values_k for K values (..., H) and coef (..., K); coef is None for a fixed branch."""
    if coef is None:
        return values[0]
    weights = coef.unsqueeze(-1).unbind(-2)
    return _dot(values, (weights[k] for k in range(len(values))))  # by index: a torch.fx proxy has no length


def _dot(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
    """Return sum_k xs_k ys_k, each (..., H) or (..., 1)."""
    pairs = zip(xs, ys, strict=True)
    x, y = next(pairs)
    total = x * y
    add = torch.addcmul if is_transformed(total) else Tensor.addcmul_
    for x, y in pairs:
        total = add(total, x, y)
    return total


def _pair_grad(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Return (..., K1, K2): sums over H of rows_k columns_l."""
    if torch.compiler.is_compiling():  # products and sums fuse with the rest of the backward; a matmul would not
        return torch.stack([torch.stack([(r * c).sum(-1) for c in columns], -1) for r in rows], -2)
    # Eager: one batched product reads each operand once. Stacking along dim 0 copies whole blocks.
    return torch.stack(rows).movedim(0, -2) @ torch.stack(columns).movedim(0, -1)
