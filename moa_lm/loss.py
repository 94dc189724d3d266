"""Cross-entropy of the next token from hidden states, without the logits of all tokens at once.

Logits are computed in chunks of tokens and turned into losses and, if needed, into the gradients of hidden states and
weight right away: only one chunk of logits exists at a time, and none is computed twice.

`torch.nn.functional.linear_cross_entropy` works alike but is newer than the oldest supported torch (2.11), opaque to
`torch.compile`, and returns the weight's gradient in the dtype of the product. Here both passes compile into one
graph, and gradients are summed in float32.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_lm.dispatch import compute_dtype

IGNORED_LABEL = -100
"""Label of tokens without loss, as in transformers."""

MIN_CHUNK = 256
"""Smallest chunk in tokens: smaller products are slow."""

MAX_CHUNKS = 16
"""Largest number of chunks: a compiled graph unrolls all of them."""


class CrossEntropy(NamedTuple):
    """Losses in nats, float32 (float64 for float64 logits).

    Attributes:
        total: () sum over all labels that are not ignored, with gradient.
        tokens: Loss of each token in the shape of the labels, 0 for ignored labels, without gradient.
    """

    total: Tensor
    tokens: Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> CrossEntropy:
    """Return the cross-entropy of softmax(hidden weight^T) with the labels, computed in chunks of tokens.

    Products use hidden's dtype or autocast's; softmax, losses and sums over chunks use float32 or wider. Gradients have
    the dtypes of `hidden` and `weight`. Differentiable once. A chunk has max(MIN_CHUNK, N / MAX_CHUNKS) tokens.

    Args:
        hidden: (N, D).
        weight: (V, D), such as `lm_head.weight`.
        labels: (N,) int64, 0 <= label < V or IGNORED_LABEL.
    """
    wanted = torch.is_grad_enabled()
    with torch.no_grad():
        total, tokens, *gradients = _compute(
            hidden, weight, labels, (wanted and hidden.requires_grad, wanted and weight.requires_grad)
        )
    if any(gradient is not None for gradient in gradients):
        total = _Attach.apply(hidden, weight, total, *gradients)
    return CrossEntropy(total, tokens)


def module_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> CrossEntropy:
    """Return the cross-entropy of softmax(head(hidden)) with the labels, computed in chunks of tokens.

    For heads with an adapter, a bias, hooks, or a quantized or sharded weight. The backward pass recomputes the logits
    of each chunk.

    Args:
        hidden: (..., T, D).
        head: Map from (..., t, D) to logits (..., t, V), independently for each token.
        labels: (..., T) int64, 0 <= label < V or IGNORED_LABEL.
    """

    def losses(x: Tensor, target: Tensor) -> Tensor:
        logits = head(torch.where((target != IGNORED_LABEL).unsqueeze(-1), x, 0.0))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        flat = target.to(logits.device).flatten()
        return F.cross_entropy(logits, flat, reduction="none", ignore_index=IGNORED_LABEL).view(target.shape)

    chunks = [checkpoint(losses, *chunk, use_reentrant=False) for chunk in _chunks(hidden, labels)]
    tokens = torch.cat(chunks, dim=-1)
    return CrossEntropy(tokens.sum(), tokens.detach())


def _compute(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the total loss, the loss of each token, and the gradients by hidden and weight if `wanted`."""
    dtype = compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    matrix = weight.to(dtype)
    losses, hidden_gradients, weight_gradient = [], [], None
    for x, target in _chunks(hidden, labels):
        counts = (target != IGNORED_LABEL).unsqueeze(-1)
        # Ignored tokens are zeroed where rows are narrow, so that they add nothing to the weight's gradient.
        x, target = torch.where(counts, x.to(dtype), 0.0), torch.where(counts, target.unsqueeze(-1), 0)
        log_probabilities = F.log_softmax(x @ matrix.t(), dim=-1, dtype=wide)
        losses.append(torch.where(counts, -log_probabilities.gather(-1, target), 0.0).squeeze(-1))
        if not any(wanted):
            continue
        gradient = log_probabilities.exp_()  # by the logits: softmax minus one-hot label
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
    """Split hidden (..., T, D) and labels (..., T) along T."""
    rows = max(1, math.prod(labels.shape[:-1]))
    size = -(-max(MIN_CHUNK, -(-labels.numel() // MAX_CHUNKS)) // rows)
    return zip(hidden.split(size, labels.ndim - 1), labels.split(size, -1), strict=True)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Add left @ right to total in place, summed in `wide` for any dtype of the product."""
    if total is None:
        return (left @ right).to(wide)
    return total.addmm_(left, right) if left.dtype == wide else total.add_(left @ right)


class _Attach(torch.autograd.Function):
    """Attaches precomputed gradients by hidden and weight to a total."""

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
