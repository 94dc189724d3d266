"""Attention over packed token trees, registered in transformers' attention interface.

Queries, keys and values of one row of tokens are gathered into (trees, heads, longest tree, head size), each position
attends to its ancestors in its tree, and the result is scattered back. Only attention is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa_eval.harness.prefix_tree import Segment
from moa_lm.transformers_internals import attention_implementation

IMPLEMENTATION = "moa_prefix_tree"
"""Name of the attention function. It has no mask function of this name, so transformers builds no mask."""
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "indices", "head_mask", "cache")
"""Arguments of attention that change its formula."""


class NotPackableError(Exception):
    """The model uses attention that token trees do not reproduce."""


class Tensors(NamedTuple):
    """Packed trees: N positions, G trees padded to L slots each, P scored tokens. All are int64.

    Attributes:
        tokens, positions: (N,) input and position ids of the row that the model reads.
        gather: (G * L,) position of each slot; 0 for padding.
        slots: (N,) slot of each position.
        end: (G * L,) end of each slot's subtree within its tree; a padding slot sees only itself.
        kept: (R,) positions whose logits are needed.
        row, target: (P,) kept row and token of each score, request by request.
    """

    tokens: Tensor
    positions: Tensor
    gather: Tensor
    slots: Tensor
    end: Tensor
    kept: Tensor
    row: Tensor
    target: Tensor


class Packing:
    """Trees packed end to end into one row of tokens, and what attention needs to separate them.

    Attributes:
        tensors: The trees as tensors on the device of the model's inputs.
        requests, counts: Index of each request, and the number of tokens that it scores.
        shape: (G, L).
        depth: Number of tokens on the longest path.
        is_chain: Whether no tree has branches.
        windows, calls: Sliding windows that the model passed to attention, and the number of its calls.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        sizes = np.array([len(segment) for segment in segments])
        starts = np.cumsum(sizes) - sizes
        multiple = 1 if device.type == "cpu" else 16
        trees, longest = self.shape = len(segments), -(-int(sizes.max()) // multiple) * multiple
        slots = np.concatenate([np.arange(size) + tree * longest for tree, size in enumerate(sizes)])
        gather = np.zeros(trees * longest, np.int64)
        gather[slots] = np.arange(len(slots))
        end = np.tile(np.arange(1, longest + 1), trees)
        end[slots] = np.concatenate([segment.end for segment in segments])
        rows = [row + start for segment, start in zip(segments, starts, strict=True) for row in segment.rows]
        kept, row = np.unique(np.concatenate(rows), return_inverse=True)
        tokens = np.concatenate([segment.tokens for segment in segments])
        positions = np.concatenate([segment.depth for segment in segments])
        targets = [target for segment in segments for target in segment.targets]
        arrays = (tokens, positions, gather, slots, end, kept, row, np.concatenate(targets))
        host = torch.cat([torch.from_numpy(array) for array in arrays])  # one transfer
        host = host.pin_memory() if device.type == "cuda" else host
        self.tensors = Tensors(*host.to(device, non_blocking=True).split([len(array) for array in arrays]))
        self.requests = [request for segment in segments for request in segment.requests]
        self.counts = [len(target) for target in targets]
        self.depth = int(positions.max()) + 1
        self.is_chain = all(segment.is_chain for segment in segments)
        self.windows: set[int] = set()
        self.calls = 0
        self._masks: dict[tuple[torch.device, torch.dtype, int | None], Tensor] = {}

    def mask(self, device: torch.device, dtype: torch.dtype, window: int | None) -> Tensor:
        """Return (trees, 1, longest, longest): 0 where a position attends and -inf elsewhere, in `dtype`."""
        key = (device, dtype, window)
        if key not in self._masks:
            trees, longest = self.shape
            index = torch.arange(longest, device=device)
            query, before = index[None, :, None], index[None, None, :]
            sees = (before <= query) & (query < self.tensors.end.to(device).view(trees, 1, longest))
            if window is not None:
                depth = self.tensors.positions[self.tensors.gather].to(device).view(trees, longest)
                sees &= depth[:, :, None] - depth[:, None, :] < window
            mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, -torch.inf)
            self._masks[key] = mask[:, None]
        return self._masks[key]


_PACKING: ContextVar[Packing | None] = ContextVar("packing", default=None)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention over the trees of the current batch, as a function of transformers' attention interface.

    Takes query (1, H, N, d), key (1, G, N, d) and value (1, G, N, e), with G key-value heads shared by H heads; returns
    (1, N, H, e) and None.

    Raises:
        NotPackableError: The model's attention is not softmax(scaling q k) v over one row of tokens.
    """
    packing = _PACKING.get()
    if packing is None:
        raise RuntimeError("tree attention needs the context packed()")
    unsupported = [name for name in UNSUPPORTED_ARGUMENTS if others.get(name) is not None]
    if unsupported or dropout or attention_mask is not None:
        raise NotPackableError(f"its attention uses {', '.join(unsupported) or 'a mask or dropout'}")
    # a model may span several devices
    gather, slots = packing.tensors.gather.to(query.device), packing.tensors.slots.to(query.device)
    if query.shape[0] != 1 or query.shape[2] != len(slots) or key.shape[2] != len(slots):
        raise NotPackableError("its attention does not read the text as one row of tokens")
    if not (others.get("is_causal", True) and getattr(module, "is_causal", True)):
        raise NotPackableError("its attention reads later tokens")
    packing.calls += 1
    if sliding_window is not None:
        packing.windows.add(sliding_window)
        sliding_window = None if sliding_window >= packing.depth else sliding_window
    causal = packing.is_chain and sliding_window is None
    mask = None if causal else packing.mask(query.device, query.dtype, sliding_window)
    trees, longest = packing.shape

    def padded(states: Tensor) -> Tensor:
        """Gather (1, heads, N, d) into (trees, H, longest, d)."""
        heads = states.shape[1]
        states = states[0].transpose(0, 1).index_select(0, gather)
        states = states.view(trees, longest, heads, 1, -1).expand(-1, -1, -1, query.shape[1] // heads, -1)
        return states.flatten(2, 3).transpose(1, 2)

    output = functional.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=mask, is_causal=causal, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, slots)[None], None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, tree_attention)


@contextmanager
def packed(model: PreTrainedModel, packing: Packing) -> Iterator[None]:
    """Use tree attention inside the context; generation keeps the model's own attention."""
    token = _PACKING.set(packing)
    try:
        with attention_implementation(model, IMPLEMENTATION):
            yield
    finally:
        _PACKING.reset(token)
