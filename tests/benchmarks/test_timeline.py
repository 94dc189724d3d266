"""A training step by part: every part in its order, and floating-point operations that add up to torch's count."""

import itertools

import pytest
import torch

from moa_ffn import FFN
from moa_vision.mae import create_mae, forward_flops

BATCH, ENCODER, DECODER, WIDTH = 3, 2, 3, 32


@pytest.fixture
def mae():
    torch.manual_seed(0)
    sizes = {"depth": ENCODER, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    decoder = {"decoder_dim": WIDTH, "decoder_depth": DECODER, "decoder_heads": 2}
    return create_mae("vit_tiny_patch16_swiglu", img_size=32, encoder_args=sizes, **decoder)


@pytest.fixture
def split(part, mae):
    """split(timeline) -> a marked training step by part."""
    images = torch.randn(BATCH, 3, 32, 32)
    training, timeline = part("training"), part("timeline")
    optimizer = training.adamw(mae)

    def run(marks):
        with timeline.marked(mae, marks):
            return timeline.split_step(lambda: mae(images).loss, optimizer, training.autocast(images.device), marks)

    return run


def test_parts_come_in_order_and_back(part, split):
    timeline = part("timeline")
    numbers = itertools.count()
    marks = timeline.Timeline(lambda: next(numbers), lambda readings: [b - a for a, b in itertools.pairwise(readings)])
    order = []
    mark = marks.mark

    def listed(phase, name):
        order.append((phase, name))
        mark(phase, name)

    marks.mark = listed
    amounts = split(marks)
    blocks = lambda name, depth: [f"{name} attention", f"{name} FFN"] * depth  # noqa: E731
    forward = ["patch embedding", *blocks("encoder", ENCODER), "encoder norm", "decoder embedding"]
    forward += [*blocks("decoder", DECODER), "head", "loss"]
    expected = [("forward", name) for name in forward] + [("backward", name) for name in reversed(forward)]
    assert order == [*expected, ("optimizer", "optimizer")]
    assert set(forward) == set(timeline.PARTS)
    assert sum(amounts.values()) == len(order)  # nothing is lost between two marks
    assert amounts["backward", "encoder FFN"] == ENCODER and amounts["forward", "decoder attention"] == DECODER


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's counter lacks the CPU's attention kernel")
def test_operations_add_up_to_torchs_count(part, mae, split):
    timeline = part("timeline")
    for ffn in mae.modules():
        if isinstance(ffn, FFN):
            ffn.backend = "eager"
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        work = split(timeline.counter(flops))
    assert sum(work.values()) == flops.get_total_flops()
    once = 6 * mae.num_patches * WIDTH**2  # the mask token's queries, keys and values, see forward_flops
    forward = {name: work["forward", name] for name in timeline.PARTS}
    assert sum(forward.values()) == BATCH * forward_flops(mae) + once
    for name in ("encoder FFN", "decoder FFN", "head", "decoder embedding"):  # gradients of inputs and of weights
        assert work["backward", name] == 2 * forward[name] > 0
    assert work["backward", "patch embedding"] == forward["patch embedding"] > 0  # pixels have no gradient
    assert work["optimizer", "optimizer"] == 0


def test_a_clock_adds_up_and_hooks_are_gone(part, mae, split):
    timeline = part("timeline")
    clock = timeline.clock(torch.device("cpu"))
    amounts = split(clock)
    assert all(amount >= 0 for amount in amounts.values()) and sum(amounts.values()) > 0
    assert not clock.marks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in mae.modules())


@pytest.mark.gpu
def test_events_of_a_gpu_cover_the_step(part, mae):
    training, timeline = part("training"), part("timeline")
    device = torch.device("cuda")
    mae.to(device)
    images, optimizer, clock = (
        torch.randn(BATCH, 3, 32, 32, device=device),
        training.adamw(mae),
        timeline.clock(device),
    )
    with timeline.marked(mae, clock):
        amounts = timeline.split_step(lambda: mae(images).loss, optimizer, training.autocast(device), clock)
    assert {name for _, name in amounts} == {*timeline.PARTS, "optimizer"}
    assert all(amount >= 0 for amount in amounts.values())
