"""Products of the experts on a CPU, expert by expert: `moa_lm::project_in` and `moa_lm::project_out`.

Tokens are gathered for one expert at a time, multiplied while they are in the cache, and the results are added to the
output: no tensor of S rows of the model's width is built. The experts of a token are added in the order of the
experts: the output of a token does not depend on its batch, and two runs agree bit for bit.

The number of rows of an expert depends on the data, so torch.compile cannot trace the loop. It sees one custom
operator each way, with known shapes and gradients, differentiable once.

Shapes: N tokens of width D, k experts per token, S = N * k rows sorted by expert, E experts, hidden width H. `tokens`
(S,) int32 is the token of each row, `ends` (E,) the row after the last one of each expert (`dispatch.Groups`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

DTYPES = (torch.float32, torch.float64)
"""Dtypes of these operators."""


def row_tokens(order: Tensor, k: int) -> Tensor:
    """Return the token of each row, int32, for order (S,) of `dispatch.Groups`.

    int32 is for speed: with int64 indices `index_add_` may sort them first, in many small parallel steps that wait for
    all threads. With int32 it adds row by row, in the same order and with the same bits.
    """
    return (order // k).to(torch.int32)


@torch.library.custom_op("moa_lm::project_in", mutates_args=())
def project_in(x: Tensor, weights: Sequence[Tensor], tokens: Tensor, ends: Tensor) -> list[Tensor]:
    """Apply its expert's maps to the token of each row: x (N, D), weights (E, O, D) each -> (S, O) each."""
    sizes = group_sizes(ends)
    gathered = _scratch(sizes, x)
    results = [x.new_empty(len(tokens), weight.shape[1]) for weight in weights]
    experts = [(weight.unbind(), result.split(sizes)) for weight, result in zip(weights, results, strict=True)]
    for expert, places in enumerate(tokens.split(sizes)):
        own = _gather(x, places, gathered)
        for weight, result in experts:
            torch.mm(own, weight[expert].t(), out=result[expert])
    return results


@torch.library.custom_op("moa_lm::project_in_backward", mutates_args=())
def project_in_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], tokens: Tensor, ends: Tensor
) -> list[Tensor]:
    """Return the gradients of x and of each weight for grads (S, O)."""
    sizes = group_sizes(ends)
    gathered, products = _scratch(sizes, x), _scratch(sizes, x)
    grad_x, grad_weights = x.new_zeros(x.shape), [_like(weight) for weight in weights]
    experts = [
        (grad.split(sizes), weight.unbind(), grad_weight.unbind())
        for grad, weight, grad_weight in zip(grads, weights, grad_weights, strict=True)
    ]
    for expert, places in enumerate(tokens.split(sizes)):
        own, back = _gather(x, places, gathered), products[: len(places)]
        for number, (grad, weight, grad_weight) in enumerate(experts):
            torch.mm(grad[expert].t(), own, out=grad_weight[expert])
            torch.addmm(back, grad[expert], weight[expert], beta=int(number > 0), out=back)
        grad_x.index_add_(0, places, back)
    return [grad_x, *grad_weights]


@torch.library.custom_op("moa_lm::project_out", mutates_args=())
def project_out(hidden: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, num_tokens: int) -> Tensor:
    """Apply its expert's map to each row and sum over the experts of a token: (S, H), (E, D, H) -> (N, D)."""
    sizes = group_sizes(ends)
    out = hidden.new_zeros(num_tokens, weight.shape[1])
    products = _scratch(sizes, out)
    for places, part, own_weight in zip(tokens.split(sizes), hidden.split(sizes), weight.unbind(), strict=True):
        out.index_add_(0, places, torch.mm(part, own_weight.t(), out=products[: len(places)]))
    return out


@torch.library.custom_op("moa_lm::project_out_backward", mutates_args=())
def project_out_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight for grad (N, D)."""
    sizes = group_sizes(ends)
    gathered = _scratch(sizes, grad)
    grad_hidden, grad_weight = _like(hidden), _like(weight)
    parts = (
        tokens.split(sizes),
        hidden.split(sizes),
        grad_hidden.split(sizes),
        weight.unbind(),
        grad_weight.unbind(),
    )
    for places, part, grad_part, own_weight, grad_own in zip(*parts, strict=True):
        own = _gather(grad, places, gathered)
        torch.mm(own.t(), part, out=grad_own)
        torch.mm(own, own_weight, out=grad_part)
    return grad_hidden, grad_weight


def group_sizes(ends: Tensor) -> list[int]:
    """Return the number of rows of each expert, zeros included: empty products zero the weights' gradients."""
    return [stop - start for start, stop in pairwise([0, *ends.tolist()])]


def _scratch(sizes: list[int], like: Tensor) -> Tensor:
    """Allocate memory for the rows of any one expert, as wide as those of `like`; reused, it stays in the cache."""
    return like.new_empty(max(sizes), like.shape[1])


def _gather(x: Tensor, places: Tensor, memory: Tensor) -> Tensor:
    return torch.index_select(x, 0, places, out=memory[: len(places)])


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, also where x is a view


@project_in.register_fake
def _(x: Tensor, weights: Sequence[Tensor], tokens: Tensor, ends: Tensor) -> list[Tensor]:
    return [x.new_empty(tokens.shape[0], weight.shape[1]) for weight in weights]


@project_in_backward.register_fake
def _(grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], tokens: Tensor, ends: Tensor) -> list[Tensor]:
    return [_like(x), *(_like(weight) for weight in weights)]


@project_out.register_fake
def _(hidden: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, num_tokens: int) -> Tensor:
    return hidden.new_empty(num_tokens, weight.shape[1])


@project_out_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return _like(hidden), _like(weight)


def _keep_in(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, tokens, ends = inputs
    ctx.save_for_backward(x, tokens, ends, *weights)


def _differentiate_in(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, tokens, ends, *weights = ctx.saved_tensors
    grad_x, *grad_weights = project_in_backward(grads, x, weights, tokens, ends)
    return grad_x, grad_weights, None, None


def _keep_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_out(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*project_out_backward(grad, *ctx.saved_tensors), None, None, None)


project_in.register_autograd(_differentiate_in, setup_context=_keep_in)
project_out.register_autograd(_differentiate_out, setup_context=_keep_out)


def _register_flops() -> None:
    """Register FLOP counts: a multiply-add per row and element of its expert's weight, twice that backward."""
    operators = torch.ops.moa_lm

    @register_flop_formula(operators.project_in)
    def _(x: Any, weights: Any, tokens: Any, *shapes: Any, **_: Any) -> int:
        return sum(2 * tokens[0] * outputs * inputs for _, outputs, inputs in weights)

    @register_flop_formula(operators.project_in_backward)
    def _(grads: Any, x: Any, weights: Any, tokens: Any, *shapes: Any, **_: Any) -> int:
        return sum(4 * tokens[0] * outputs * inputs for _, outputs, inputs in weights)

    @register_flop_formula(operators.project_out)
    def _(hidden: Any, weight: Any, tokens: Any, *shapes: Any, **_: Any) -> int:
        return 2 * tokens[0] * weight[1] * weight[2]

    @register_flop_formula(operators.project_out_backward)
    def _(grad: Any, hidden: Any, weight: Any, tokens: Any, *shapes: Any, **_: Any) -> int:
        return 4 * tokens[0] * weight[1] * weight[2]


_register_flops()
