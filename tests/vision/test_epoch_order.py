"""The order of samples: complete, windowed, and a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_vision.epoch_order import EpochOrder

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(shard_sizes, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_order_covers_every_image_within_its_window(sizes, seed, window, repeats, shared):
    starts = np.cumsum([0, *sizes])
    order = EpochOrder(starts, seed, window, repeats)
    total = sum(sizes)
    assert (order.slots, len(order)) == (total // repeats, total // repeats * repeats)
    if not order.slots:
        return
    shown = [order.sample(shared * repeats + e, slot) for e in range(repeats) for slot in range(order.slots)]
    assert len(set(shown)) == len(shown) == order.slots * repeats
    shards = [int(np.searchsorted(starts, sample, side="right")) - 1 for sample in shown]
    for shard in set(shards):  # between a shard's first and last sample only the shards of its window are read
        span = shards[shards.index(shard) : len(shards) - shards[::-1].index(shard)]
        assert len(set(span)) <= window
    again = EpochOrder(starts, seed, window, repeats)
    assert [again.sample(shared * repeats, slot) for slot in range(order.slots)] == shown[: order.slots]
    assert order.sample(shared * repeats, order.slots) == shown[0], "wraps around"


def test_orders_of_seeds_and_epochs_differ():
    starts = np.arange(0, 1001, 100)
    orders = [EpochOrder(starts, seed, 4) for seed in (0, 1)]
    shown = {tuple(order.sample(epoch, slot) for slot in range(1000)) for order in orders for epoch in (0, 1)}
    assert len(shown) == 4
    with pytest.raises(ValueError, match="seed is -1"):
        EpochOrder(starts, -1, 4)
