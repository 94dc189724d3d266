"""Router and losses against torch's functions, closed forms and transformers' load-balancing loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moa_lm.router import TopKRouter, choose_experts, load_balancing_loss, router_entropy, router_z_loss


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_router_is_float32_in_any_precision(autocast):
    router = TopKRouter(64, 5, 2, init_std=1.0).bfloat16()
    hidden = logits(30, 64).bfloat16()
    expected = F.linear(hidden.float(), router.weight.float())
    if autocast:
        router, hidden = router.float(), hidden.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, weights, indices = router(hidden)
    assert found.dtype == weights.dtype == torch.float32 and indices.dtype == torch.int64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30))


def test_ties_go_to_the_first_experts():
    _, indices = choose_experts(torch.full((100, 40), 1 / 40), 3)
    assert (indices == torch.arange(3)).all()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_load_balancing_equals_transformers_for_one_sequence(k, masked):
    ours, theirs = (logits(1, 15, 6).requires_grad_() for _ in range(2))
    mask = (torch.arange(15) < 9).long().unsqueeze(0) if masked else None
    loss = load_balancing_loss(ours, k, mask)
    expected = load_balancing_loss_func((theirs.view(-1, 6),), 6, k, mask) / k
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert masked == (not ours.grad[0, 9:].any())


def test_load_balancing_averages_over_sequences():
    whole, mask = logits(6, 11, 5), torch.ones(6, 11)
    mask[1, 4:] = mask[4, :7] = 0
    single = [load_balancing_loss_func((s,), 5, 2, m) / 2 for s, m in zip(whole, mask, strict=True)]
    torch.testing.assert_close(load_balancing_loss(whole, 2, mask), torch.stack(single).mean())
    halves = [load_balancing_loss(whole[part], 2, mask[part]) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(load_balancing_loss(whole, 2, mask), torch.stack(halves).mean())
    batchwise = load_balancing_loss_func((whole.view(-1, 5),), 5, 2, mask) / 2
    assert abs(batchwise - torch.stack(single).mean()) > 1e-3  # the definitions differ


def test_padding_is_ignored():
    short, mask = logits(2, 7, 5), torch.ones(2, 10)
    mask[:, 7:] = 0
    padding = torch.stack([torch.full((5,), value) for value in (torch.nan, torch.inf, 1e30)])
    padded = torch.cat([short, padding.expand(2, 3, 5)], dim=1)
    for function, arguments in ((load_balancing_loss, (2,)), (router_z_loss, ())):
        torch.testing.assert_close(function(padded, *arguments, mask), function(short, *arguments))
        torch.testing.assert_close(function(padded, *arguments, mask.bool()), function(short, *arguments))


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4), (2, 0, 4)], ids=["masked", "no sequence", "no token"])
def test_losses_without_tokens_are_zero(shape):
    x, mask = logits(*shape).requires_grad_(), torch.zeros(shape[:2])
    total = load_balancing_loss(x, 2, mask) + router_z_loss(x, mask)
    total.backward()
    assert total.item() == 0 and not x.grad.any()


def test_entropy_closed_forms():
    assert router_entropy(torch.zeros(2, 3, 8)).item() == pytest.approx(math.log(8))
    certain = torch.full((1, 2, 8), -1e9)
    certain[..., 3] = 0.0
    assert router_entropy(certain).item() == 0
    x = logits(2, 3, 8)
    expected = torch.distributions.Categorical(logits=x).entropy().mean()
    torch.testing.assert_close(router_entropy(x), expected)


def test_mask_of_another_shape_raises():
    x, mask = torch.zeros(2, 3, 4), torch.ones(2, 4)
    for call in (lambda: load_balancing_loss(x, 2, mask), lambda: router_z_loss(x, mask)):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\); .* \(2, 3\)"):
            call()
