"""Cross-entropy of the next token from hidden states, without the logits of all tokens.

Logits are made for some tokens at a time and turned at once into losses and, where a gradient is wanted, into the
gradients of the hidden states and of the weight: the work is that of the plain way, the logits are never computed
again, and only one chunk of them exists at a time.

torch's own `torch.nn.functional.linear_cross_entropy` came after the oldest torch supported here (2.11). It is built
alike, but to `torch.compile` it is one opaque operation, and it hands the weight's gradient back in the product's
dtype; here both passes compile into one graph, and gradients are summed in float32.

Shapes: N tokens, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_lm.dispatch import compute_dtype

IGNORED_LABEL = -100
"""Labels of this value count in no loss, as in transformers."""

MIN_CHUNK, MAX_CHUNKS = 256, 16
"""Tokens of a chunk, at least: products of fewer are slow. Chunks, at most: a compiled graph writes each one out."""


class CrossEntropy(NamedTuple):
    """Losses in nats, float32 (float64 of float64 logits).

    total: (), sum over the labels that count; it has the gradient.
    tokens: shaped as the labels, each token's, 0 where the label is ignored; without gradient.
    """

    total: Tensor
    tokens: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = IGNORED_LABEL
) -> CrossEntropy:
    """Cross-entropy of softmax(hidden weight^T) with the labels, by chunks of tokens.

    Products are computed in hidden's dtype or autocast's, softmax, losses and sums over chunks in float32 or wider;
    gradients come in the dtypes of `hidden` and `weight`. Differentiable once.

    A chunk has N / MAX_CHUNKS tokens, but at least MIN_CHUNK.

    Args:
        hidden: (N, D).
        weight: (V, D), such as `lm_head.weight`.
        labels: (N,) int64, 0 <= label < V or `ignore_index`.
        ignore_index: labels of this value count in no loss and give no gradient.

    Raises:
        ValueError: the shapes do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, labels))
        raise ValueError(f"hidden, weight, labels of shapes {shapes}: allowed are (N, D), (V, D), (N,)")
    wanted = torch.is_grad_enabled()
    with torch.no_grad():
        total, tokens, *gradients = _compute(
            hidden, weight, labels, ignore_index, (wanted and hidden.requires_grad, wanted and weight.requires_grad)
        )
    if any(gradient is not None for gradient in gradients):
        total = _Attach.apply(hidden, weight, total, *gradients)
    return CrossEntropy(total, tokens)


def module_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, *, ignore_index: int = IGNORED_LABEL
) -> CrossEntropy:
    """Cross-entropy of softmax(head(hidden)) with the labels, by chunks of tokens.

    For heads that are more than a matrix: with an adapter, a bias, hooks, or a quantized or sharded weight. Each
    chunk's logits are computed a second time, in the backward pass.

    Args:
        hidden: (..., T, D).
        head: maps (..., t, D) to logits (..., t, V), each token on its own.
        labels: (..., T) int64, 0 <= label < V or `ignore_index`.
        ignore_index: labels of this value count in no loss and give no gradient.
    """

    def losses(x: Tensor, target: Tensor) -> Tensor:
        logits = head(torch.where((target != ignore_index).unsqueeze(-1), x, 0.0))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        flat = target.to(logits.device).flatten()
        return F.cross_entropy(logits, flat, reduction="none", ignore_index=ignore_index).view(target.shape)

    chunks = [checkpoint(losses, *chunk, use_reentrant=False) for chunk in _chunks(hidden, labels)]
    tokens = torch.cat(chunks, dim=-1)
    return CrossEntropy(tokens.sum(), tokens.detach())


def _compute(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses, each token's, and the sum's gradients by hidden and weight where wanted."""
    dtype = compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    matrix = weight.to(dtype)
    losses, hidden_gradients, weight_gradient = [], [], None
    for x, target in _chunks(hidden, labels):
        counts = (target != ignore_index).unsqueeze(-1)
        # Ignored tokens are zeroed here, where the rows are narrow, and so add nothing to the weight's gradient.
        x, target = torch.where(counts, x.to(dtype), 0.0), torch.where(counts, target.unsqueeze(-1), 0)
        log_probabilities = F.log_softmax(x @ matrix.t(), dim=-1, dtype=wide)
        losses.append(torch.where(counts, -log_probabilities.gather(-1, target), 0.0).squeeze(-1))
        if not any(wanted):
            continue
        gradient = log_probabilities.exp_()  # by the logits: softmax, minus 1 at the label
        gradient = gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=wide)).to(dtype)
        if wanted[0]:
            hidden_gradients.append(torch.where(counts, gradient @ matrix, 0.0).to(hidden.dtype))
        if wanted[1]:
            weight_gradient = _add_product(weight_gradient, gradient.t(), x, wide)
    tokens = torch.cat(losses)
    return (
        tokens.sum(),
        tokens,
        torch.cat(hidden_gradients) if wanted[0] else None,
        weight_gradient.to(weight.dtype) if weight_gradient is not None else None,
    )


def _chunks(hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of hidden (..., T, D) and labels (..., T) along T."""
    rows = max(1, math.prod(labels.shape[:-1]))
    size = -(-max(MIN_CHUNK, -(-labels.numel() // MAX_CHUNKS)) // rows)
    return zip(hidden.split(size, labels.ndim - 1), labels.split(size, -1), strict=True)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """total + left @ right, in place; summed in `wide`, whatever the product's dtype is."""
    if total is None:
        return (left @ right).to(wide)
    return total.addmm_(left, right) if left.dtype == wide else total.add_(left @ right)


class _Attach(torch.autograd.Function):
    """The given total, with the given gradients by hidden and weight."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        hidden_gradient: Tensor | None,
        weight_gradient: Tensor | None,
    ) -> Tensor:
        return total.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = (None if saved is None else grads[0] * saved for saved in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None
