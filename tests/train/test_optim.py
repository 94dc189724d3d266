"""The rate against timm's and torch's schedulers; every parameter in exactly one group."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from moa_train.config import OptimConfig
from moa_train.optim import build_optimizer, describe_groups, lr_at, parameter_groups, set_rate


def a_parameter(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(("warmup", "total", "min_lr"), [(0, 1, 0.0), (0, 10, 0.1), (3, 20, 0.0), (40, 800, 1e-6)])
def test_rate_equals_timm(warmup, total, min_lr):
    optimizer = a_parameter(0.5)
    scheduler = CosineLRScheduler(
        optimizer, total - warmup, lr_min=min_lr, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(total):
        scheduler.step_update(step)
        rate = lr_at(step, lr=0.5, min_lr=min_lr, warmup_steps=warmup, total_steps=total)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
    assert lr_at(total, lr=0.5, min_lr=min_lr, warmup_steps=warmup, total_steps=total) == pytest.approx(min_lr)


def test_layer_wise_rates_equal_timm():
    ours, theirs = (
        torch.optim.SGD(
            [{"params": [nn.Parameter(torch.zeros(1))], **extra} for extra in ({"lr_scale": 0.3}, {})], 0.5
        )
        for _ in range(2)
    )
    scheduler = CosineLRScheduler(theirs, 15, lr_min=0.01, warmup_t=5, warmup_prefix=True, t_in_epochs=False)
    for step in range(20):
        scheduler.step_update(step)
        set_rate(ours, lr_at(step, lr=0.5, min_lr=0.01, warmup_steps=5, total_steps=20))
        rates = [group["lr"] for group in ours.param_groups]
        assert rates == pytest.approx([group["lr"] for group in theirs.param_groups], rel=1e-12, abs=1e-15)


def test_rate_equals_torch():
    optimizer = a_parameter(0.5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.01),
        ],
        milestones=[5],
    )
    for step in range(25):
        rate = lr_at(step, lr=0.5, min_lr=0.01, warmup_steps=5, total_steps=25)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mix_coef = nn.Parameter(torch.zeros(3, 2))
        self.fixed = nn.Parameter(torch.zeros(5, 4), requires_grad=False)


def test_groups():
    model = Model()
    decayed, plain = parameter_groups(model, 0.05, {"mix_coef"})
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["token", "conv.weight"]
    assert [names[p] for p in plain["params"]] == ["mix_coef", "conv.bias", "norm.weight", "norm.bias"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_a_tied_weight_is_in_one_group():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    (group,) = parameter_groups(model, 0.05)
    assert len(group["params"]) == 1


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"mix_coeff.*not trainable parameters of Model"):
        parameter_groups(Model(), 0.05, {"mix_coeff"})


def test_optimizer():
    optimizer = build_optimizer(Model(), OptimConfig(lr=3e-4, weight_decay=0.1), {"mix_coef"})
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["fused"]
    assert describe_groups(optimizer) == "AdamW: 2 tensors (52) with weight decay 0.1; 4 tensors (18) without"
    assert not build_optimizer(Model(), OptimConfig(fused=False)).defaults["fused"]


def test_groups_that_differ_in_rate_only_are_told_together():
    first, second, third = (nn.Parameter(torch.zeros(size)) for size in (2, 3, 4))
    groups = [
        {"params": [first], "weight_decay": 0.0, "lr_scale": 0.25},
        {"params": [second], "weight_decay": 0.05, "lr_scale": 0.25},
        {"params": [third], "weight_decay": 0.05, "lr_scale": 1.0},
    ]
    told = describe_groups(torch.optim.SGD(groups, 0.1))
    assert told == "SGD: 2 tensors (7) with weight decay 0.05; 1 tensors (2) without; rates scaled by 0.25 to 1"
    assert describe_groups(a_parameter(0.1)) == "SGD: 1 tensors (1) without weight decay"
