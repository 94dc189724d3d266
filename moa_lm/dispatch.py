"""Drop-free dispatch of tokens to experts: sort assignments by expert, multiply group by group, sum in fixed order.

Every token reaches all of its experts. Nothing is scattered with atomics, forward or backward, and the experts of a
token are added in a fixed order, that of their weights or (on CPUs) of the experts: the output of a token does not
depend on its batch, and two runs agree bit for bit.

Shapes: N tokens, k experts per token, S = N * k assignments (token, choice), E experts. A "row" is the position of an
assignment in the order by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_lm import expert_blocks
from moa_train.errors import ConfigError

METHODS = ("auto", "blocks", "grouped", "loop")
"""Methods of the experts' products: "blocks" gathers, multiplies and adds expert by expert (expert_blocks.py; CPUs),
"grouped" is torch's grouped product, "loop" one product per expert, "auto" the first that is available."""

_ALIGNMENT = 16
"""Bytes to which grouped products need rows aligned."""

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Groups(NamedTuple):
    """Assignments sorted by expert, in the order of tokens within an expert; int64 except `ends`.

    Attributes:
        order: (S,) token * k + choice of each row.
        rows: (N, k) row of each assignment.
        experts: (S,) expert of each row.
        ends: (E,) int32, the row after the last one of each expert.
    """

    order: Tensor
    rows: Tensor
    experts: Tensor
    ends: Tensor


def group_by_expert(indices: Tensor, num_experts: int) -> Groups:
    """Sort assignments (N, k) with entries 0..E-1 by expert, without a device synchronization."""
    experts, order = indices.flatten().sort(stable=True)
    places = torch.arange(len(order), device=order.device)
    rows = torch.empty_like(order).scatter(0, order, places).view_as(indices)
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True, out_int32=True)
    return Groups(order, rows, experts, ends)


def dispatch(x: Tensor, groups: Groups) -> Tensor:
    """Copy tokens to rows: x (N, *) -> (S, *)."""
    return _Dispatch.apply(x, groups.order, groups.rows)


def combine(out: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Sum the rows of each token with weights: out (S, D), weights (N, k) -> (N, D).

    The sum runs over choices 0, 1, ... in the weights' dtype and is returned in out's dtype.
    """
    return _Combine.apply(out, weights, groups.order, groups.rows)


def project_in(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], groups: Groups, method: str) -> list[Tensor]:
    """Apply linear maps of each of its experts to every token: x (N, I) -> (S, O) for each map.

    A map has a weight (E, O, I) and a bias (E, O) or None; `method` is a result of `choose_method`. Results have x's
    dtype or autocast's.
    """
    if method == "blocks":
        tokens = expert_blocks.row_tokens(groups.order, groups.rows.shape[1])
        products = expert_blocks.project_in(x, [weight for weight, _ in maps], tokens, groups.ends)
        return [_with_bias(a, bias, groups) for a, (_, bias) in zip(products, maps, strict=True)]
    rows = dispatch(x, groups)
    return [grouped_linear(rows, weight, bias, groups, method) for weight, bias in maps]


def project_out(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, groups: Groups, method: str
) -> Tensor:
    """Apply its expert's linear map to every row and sum the rows of each token with weights: (S, I) -> (N, O).

    Shapes are weight (E, O, I), bias (E, O) and scales (N, k), the weights of the sum. The result has hidden's dtype or
    autocast's.
    """
    if method != "blocks":
        return combine(grouped_linear(hidden, weight, bias, groups, method), scales, groups)
    # Rows are scaled before the product, where they are narrow and compilers fuse the scaling with the mixture.
    hidden = hidden * scales.to(hidden.dtype).flatten().gather(0, groups.order).unsqueeze(-1)
    tokens = expert_blocks.row_tokens(groups.order, groups.rows.shape[1])
    out = expert_blocks.project_out(hidden, weight, tokens, groups.ends, len(groups.rows))
    return out if bias is None else out + combine(F.embedding(groups.experts, bias), scales, groups)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, method: str) -> Tensor:
    """Apply its expert's linear map, weight (E, O, I) and bias (E, O), to each row: (S, I) -> (S, O).

    `method` is "grouped" or "loop", which reads the group sizes on the host: that synchronizes the device and breaks a
    compiled graph. The result has x's dtype or autocast's.
    """
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    # The gradient of the grouped product fails on empty tensors.
    product = _grouped(x, weight, groups.ends) if method == "grouped" and len(x) else _loop(x, weight, groups.ends)
    return _with_bias(product, bias, groups)


def _with_bias(product: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    # The gradient of an embedding sums repeated entries in a fixed order; that of indexing uses atomics on the CPU.
    return product if bias is None else product + F.embedding(groups.experts, bias).to(product.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x: x's, or autocast's where it applies."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def choose_method(method: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "blocks", "grouped" or "loop" for `method`, one of `METHODS`.

    Raises:
        ConfigError: A method other than "auto" is unavailable for this device and dtype.
    """
    available = ["loop"]
    if device.type in ("cpu", "cuda", "meta") and dtype in _GROUPED_DTYPES:
        available.insert(0, "grouped")
    if device.type == "cpu" and dtype in expert_blocks.DTYPES:
        available.insert(0, "blocks")
    if method == "auto":
        return available[0]
    if method not in available:
        raise ConfigError(
            f"expert_dispatch is {method!r}, which is unavailable for {dtype} on {device.type}; use auto or loop"
        )
    return method


@torch.compiler.disable()
def _loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    sizes = expert_blocks.group_sizes(ends)
    # The gradient of unbind is one stack; that of indexing is full-sized for each expert.
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), weight.unbind(), strict=True)])


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    step = _ALIGNMENT // x.element_size()
    fan_out, fan_in = weight.shape[1:]
    pad_out, pad_in = -fan_out % step, -fan_in % step
    if pad_out or pad_in:
        x, weight = F.pad(x, (0, pad_in)), F.pad(weight, (0, pad_in, 0, pad_out))
    product = _ContiguousGradient.apply(F.grouped_mm(x, weight.transpose(-2, -1), offs=ends))
    return product[:, :fan_out] if pad_out else product


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous and 16-byte aligned, as grouped products need it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


class _Dispatch(torch.autograd.Function):
    """x[token of each row], with a gradient that gathers where autograd's would scatter with atomics."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        return x[order // rows.shape[1]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        wide = torch.promote_types(grad.dtype, torch.float32)
        first, *others = rows.unbind(1)
        total = grad[first].to(wide)
        for choice in others:
            total = total + grad[choice]
        return total.to(grad.dtype), None, None


class _Combine(torch.autograd.Function):
    """Weighted sum of each token's rows, with a gradient that gathers."""

    @staticmethod
    def forward(out: Tensor, weights: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        first, *others = zip(rows.unbind(1), weights.unsqueeze(-1).unbind(1), strict=True)
        total = out[first[0]] * first[1]
        for choice, weight in others:
            total = total + out[choice] * weight
        return total if total.dtype == out.dtype else total.to(out.dtype)  # see `moa_ffn.backends.eager._add_product`

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (out, weights, order, rows), (grad,) = ctx.saved_tensors, grads
        grad_out = grad_weights = None
        if ctx.needs_input_grad[0]:
            row_weights = weights.flatten()[order].unsqueeze(-1)
            grad_out = (grad[order // rows.shape[1]] * row_weights).to(out.dtype)
        if ctx.needs_input_grad[1]:
            wide = grad.to(weights.dtype)
            grad_weights = torch.stack([(out[choice] * wide).sum(-1) for choice in rows.unbind(1)], dim=1)
        return grad_out, grad_weights, None, None
