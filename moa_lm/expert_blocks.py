"""The experts' products on a CPU, one expert after the other: `moa_lm::project_in` and `moa_lm::project_out`.

Tokens are gathered for one expert at a time, multiplied while they lie in the cache, and their results added where
they belong: nothing of S rows of the model's width is ever built. A token's experts are added one after the other, in
the order of the experts: its output does not depend on its batch, and two runs agree bit for bit.

The number of rows of an expert depends on the data, so that torch.compile could not look into the loop; it sees one
operator each way (`torch.library.custom_op`), of known shapes and with known gradients, differentiable once.

Shapes: N tokens of width D, k experts a token, S = N * k rows sorted by expert, E experts, hidden width H; `order`,
`rows` and `ends` are the fields of `dispatch.Groups`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

DTYPES = (torch.float32, torch.float64)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these operators cannot run, or None."""
    if device.type == "cpu" and dtype in DTYPES:
        return None
    return "experts are taken one after the other in float32 and float64 on a CPU only"


@torch.library.custom_op("moa_lm::project_in", mutates_args=())
def project_in(x: Tensor, weights: Sequence[Tensor], order: Tensor, rows: Tensor, ends: Tensor) -> list[Tensor]:
    """Each row's token through its expert's maps: x (N, D), weights (E, O, D) each -> (S, O) each."""
    tokens, parts = order // rows.shape[1], _parts(ends)
    gathered = _scratch(parts, x)
    results = [x.new_empty(len(order), weight.shape[1]) for weight in weights]
    for expert, part in enumerate(parts):
        own = _gather(x, tokens[part], gathered)
        for result, weight in zip(results, weights, strict=True):
            torch.mm(own, weight[expert].t(), out=result[part])
    return results


@torch.library.custom_op("moa_lm::project_in_backward", mutates_args=())
def project_in_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], order: Tensor, rows: Tensor, ends: Tensor
) -> list[Tensor]:
    """The gradients of x and of each of the weights for grads (S, O)."""
    tokens, parts = order // rows.shape[1], _parts(ends)
    gathered, products = _scratch(parts, x), _scratch(parts, x)
    grad_x, grad_weights = x.new_zeros(x.shape), [_like(weight) for weight in weights]
    for expert, part in enumerate(parts):
        own, back = _gather(x, tokens[part], gathered), products[: part.stop - part.start]
        for number, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            torch.mm(grad[part].t(), own, out=grad_weights[number][expert])
            torch.addmm(back, grad[part], weight[expert], beta=int(number > 0), out=back)
        grad_x.index_add_(0, tokens[part], back)
    return [grad_x, *grad_weights]


@torch.library.custom_op("moa_lm::project_out", mutates_args=())
def project_out(hidden: Tensor, weight: Tensor, order: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The sum over a token's experts: hidden (S, H), weight (E, D, H) -> (N, D)."""
    tokens, parts = order // rows.shape[1], _parts(ends)
    out = hidden.new_zeros(len(rows), weight.shape[1])
    products = _scratch(parts, out)
    for expert, part in enumerate(parts):
        own = torch.mm(hidden[part], weight[expert].t(), out=products[: part.stop - part.start])
        out.index_add_(0, tokens[part], own)
    return out


@torch.library.custom_op("moa_lm::project_out_backward", mutates_args=())
def project_out_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, order: Tensor, rows: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight for grad (N, D)."""
    tokens, parts = order // rows.shape[1], _parts(ends)
    gathered = _scratch(parts, grad)
    grad_hidden, grad_weight = _like(hidden), _like(weight)
    for expert, part in enumerate(parts):
        own = _gather(grad, tokens[part], gathered)
        torch.mm(own.t(), hidden[part], out=grad_weight[expert])
        torch.mm(own, weight[expert], out=grad_hidden[part])
    return grad_hidden, grad_weight


def _parts(ends: Tensor) -> list[slice]:
    """The rows of each expert. Those without any stay in: their products set the weights' gradients to zero."""
    return [slice(*bounds) for bounds in pairwise([0, *ends.tolist()])]


def _scratch(parts: list[slice], like: Tensor) -> Tensor:
    """Memory for the rows of any one expert, as wide as those of `like`: taken once, it stays in the cache."""
    return like.new_empty(max(part.stop - part.start for part in parts), like.shape[1])


def _gather(x: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
    return torch.index_select(x, 0, tokens, out=memory[: len(tokens)])


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, also where x is a view


@project_in.register_fake
def _(x: Tensor, weights: Sequence[Tensor], order: Tensor, rows: Tensor, ends: Tensor) -> list[Tensor]:
    return [x.new_empty(order.shape[0], weight.shape[1]) for weight in weights]


@project_in_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], order: Tensor, rows: Tensor, ends: Tensor
) -> list[Tensor]:
    return [_like(x), *(_like(weight) for weight in weights)]


@project_out.register_fake
def _(hidden: Tensor, weight: Tensor, order: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return hidden.new_empty(rows.shape[0], weight.shape[1])


@project_out_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, order: Tensor, rows: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(hidden), _like(weight)


def _keep_in(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, *groups = inputs
    ctx.save_for_backward(x, *groups, *weights)


def _differentiate_in(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, order, rows, ends, *weights = ctx.saved_tensors
    grad_x, *grad_weights = project_in_backward(grads, x, weights, order, rows, ends)
    return grad_x, grad_weights, None, None, None


def _keep_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_out(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*project_out_backward(grad, *ctx.saved_tensors), None, None, None)


project_in.register_autograd(_differentiate_in, setup_context=_keep_in)
project_out.register_autograd(_differentiate_out, setup_context=_keep_out)


def _register_flops() -> None:
    """Each row meets the elements of one expert's weight: a multiply-add each, forward once and backward twice."""
    operators = torch.ops.moa_lm

    @register_flop_formula(operators.project_in)
    def _(x: Any, weights: Any, order: Any, *shapes: Any, **_: Any) -> int:
        return sum(2 * order[0] * outputs * inputs for _, outputs, inputs in weights)

    @register_flop_formula(operators.project_in_backward)
    def _(grads: Any, x: Any, weights: Any, order: Any, *shapes: Any, **_: Any) -> int:
        return sum(4 * order[0] * outputs * inputs for _, outputs, inputs in weights)

    @register_flop_formula(operators.project_out)
    def _(hidden: Any, weight: Any, order: Any, *shapes: Any, **_: Any) -> int:
        return 2 * order[0] * weight[1] * weight[2]

    @register_flop_formula(operators.project_out_backward)
    def _(grad: Any, hidden: Any, weight: Any, order: Any, *shapes: Any, **_: Any) -> int:
        return 4 * order[0] * weight[1] * weight[2]


_register_flops()
