"""Attention over packed token trees, as an implementation in transformers' attention interface.

Queries, keys and values of one row of tokens are gathered into (trees, heads, longest tree, head size), each position
attends to its ancestors in its tree, and the result is scattered back. Nothing outside attention is padded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa_eval.harness.prefix_tree import Batch
from moa_lm.transformers_internals import attention_implementation

IMPLEMENTATION = "moa_prefix_tree"  # no mask function is registered under this name: transformers then builds no mask
# Arguments of attention that change its formula in ways not reproduced here.
FOREIGN_ARGUMENTS = ("softcap", "s_aux", "position_bias", "indices", "head_mask", "cache")


class NotPackableError(Exception):
    """Attention was asked for something that token trees do not reproduce."""


class Packing:
    """The batch in flight as attention sees it; tensors are made once for each device, dtype and window."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.shape = batch.end.shape
        self.is_chain, self.depth = batch.is_chain, batch.depth
        parts = [batch.tokens, batch.positions, batch.gather, batch.slots, batch.end.ravel()]
        parts += [batch.kept, batch.row, batch.target]
        host = torch.cat([torch.from_numpy(part) for part in parts])
        if device.type == "cuda":
            host = host.pin_memory()
        self.tensors = host.to(device, non_blocking=True).split([part.size for part in parts])
        self.copies: dict[torch.device, tuple[Tensor, ...]] = {device: self.tensors}
        self.masks: dict[tuple[torch.device, torch.dtype, int | None], Tensor] = {}
        self.windows: set[int] = set()
        self.calls = 0

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The batch's tensors on the device of the layer that asks, which differs if a model spans several."""
        if device not in self.copies:
            self.copies[device] = tuple(tensor.to(device) for tensor in self.tensors)
        return self.copies[device]

    def mask(self, device: torch.device, dtype: torch.dtype, window: int | None) -> Tensor:
        """(trees, 1, longest, longest), 0 where a position may look and -inf elsewhere, in the queries' dtype."""
        key = (device, dtype, window)
        if key not in self.masks:
            trees, longest = self.shape
            _, positions, gather, _, end, *_ = self.on(device)
            index = torch.arange(longest, device=device)
            query, before = index[None, :, None], index[None, None, :]
            sees = (before <= query) & (query < end.view(trees, 1, longest))
            if window is not None:
                depth = positions[gather].view(trees, longest)
                sees &= depth[:, :, None] - depth[:, None, :] < window
            mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, -torch.inf)
            self.masks[key] = mask[:, None]
        return self.masks[key]


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
    """Attention over the trees of the batch in flight, as transformers' attention interface wants it.

    query (1, H, N, d), key (1, G, N, d), value (1, G, N, e), with G heads shared by H; returns (1, N, H, e) and None.
    Raises NotPackableError where the model asks for another formula than softmax(q k / scale) v.
    """
    packing = _PACKING.get()
    if packing is None:
        raise RuntimeError("prefix-tree attention runs inside packed() only")
    foreign = [name for name in FOREIGN_ARGUMENTS if others.get(name) is not None]
    if foreign or dropout or attention_mask is not None:
        raise NotPackableError(f"its attention uses {', '.join(foreign) or 'a mask or dropout'}")
    _, _, gather, slots, *_ = packing.on(query.device)
    if query.shape[0] != 1 or query.shape[2] != len(slots) or key.shape[2] != len(slots):
        raise NotPackableError("its attention does not see the text as one row of tokens")
    if not (others.get("is_causal", True) and getattr(module, "is_causal", True)):
        raise NotPackableError("its attention looks at later tokens too")
    packing.calls += 1
    if sliding_window is not None:
        packing.windows.add(sliding_window)
        sliding_window = None if sliding_window >= packing.depth else sliding_window
    causal = packing.is_chain and sliding_window is None
    mask = None if causal else packing.mask(query.device, query.dtype, sliding_window)
    trees, longest = packing.shape

    def padded(states: Tensor) -> Tensor:
        """(1, heads, N, d) -> (trees, H, longest, d)."""
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
    """Let a model's attention be ours for one forward pass; generation keeps its own."""
    token = _PACKING.set(packing)
    try:
        with attention_implementation(model, IMPLEMENTATION):
            yield
    finally:
        _PACKING.reset(token)
