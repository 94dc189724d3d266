"""Learning rate schedules against timm, torch and transformers; the split of the global batch."""

from typing import get_args

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from transformers import get_wsd_schedule

from moa_train.optim import set_rate
from moa_train.schedule import DecayType, lr_at

WSD = {"warmup_steps": 4, "total_steps": 30, "decay_steps": 11}


def sgd(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates_of(scheduler, optimizer, steps):
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "total", "min_lr"), [(0, 10, 0.1), (3, 20, 0.0)])
def test_cosine_matches_timm(warmup, total, min_lr):
    optimizer = sgd(0.5)
    scheduler = CosineLRScheduler(
        optimizer, total - warmup, lr_min=min_lr, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(total):
        scheduler.step_update(step)
        rate = lr_at(step, lr=0.5, min_lr=min_lr, warmup_steps=warmup, total_steps=total)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
    assert lr_at(total, lr=0.5, min_lr=min_lr, warmup_steps=warmup, total_steps=total) == pytest.approx(min_lr)


def test_layer_wise_rates_match_timm():
    ours, theirs = (
        torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **extra} for extra in ({"lr_scale": 0.3}, {})], 0.5)
        for _ in range(2)
    )
    scheduler = CosineLRScheduler(theirs, 15, lr_min=0.01, warmup_t=5, warmup_prefix=True, t_in_epochs=False)
    for step in range(20):
        scheduler.step_update(step)
        set_rate(ours, lr_at(step, lr=0.5, min_lr=0.01, warmup_steps=5, total_steps=20))
        expected = [group["lr"] for group in theirs.param_groups]
        assert [group["lr"] for group in ours.param_groups] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("decay_type", get_args(DecayType))
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
def test_warmup_stable_decay_matches_transformers(decay_type, min_lr):
    optimizer = sgd(0.5)
    scheduler = get_wsd_schedule(optimizer, 4, 11, 30, decay_type=decay_type, min_lr_ratio=min_lr / 0.5)
    for step, expected in enumerate(rates_of(scheduler, optimizer, 31)):
        if step >= 4 or not min_lr:  # transformers warms up from min_lr
            rate = lr_at(step, lr=0.5, min_lr=min_lr, decay_type=decay_type, **WSD)
            assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)
