"""The rate against timm's, torch's and transformers' schedulers; every parameter in exactly one group; Muon and AdamW
act as one optimizer."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_wsd_schedule

from moa_train import checkpoint
from moa_train.config import OptimConfig
from moa_train.muon import StackedMuon
from moa_train.optim import Combined, build_optimizer, describe_groups, parameter_groups, set_rate
from moa_train.schedule import DECAY_SHAPES, lr_at


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
        torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **extra} for extra in ({"lr_scale": 0.3}, {})], 0.5)
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


WSD = {"warmup_steps": 4, "total_steps": 30, "decay_steps": 11}


@pytest.mark.parametrize("shape", DECAY_SHAPES)
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
def test_warmup_stable_decay_equals_transformers(shape, min_lr):
    optimizer = a_parameter(0.5)
    scheduler = get_wsd_schedule(optimizer, 4, 11, 30, decay_type=shape, min_lr_ratio=min_lr / 0.5)
    for step in range(31):
        if step >= 4 or not min_lr:  # theirs warms up from min_lr, ours from 0
            rate = lr_at(step, lr=0.5, min_lr=min_lr, shape=shape, **WSD)
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_warmup_stable_decay_equals_torch():
    optimizer = a_parameter(0.5)
    parts = [
        lr_scheduler.LambdaLR(optimizer, lambda step: step / 4),
        lr_scheduler.ConstantLR(optimizer, factor=1.0),
        lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=11),
    ]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[4, 30 - 11])
    for step in range(31):
        rate = lr_at(step, lr=0.5, min_lr=0.05, shape="linear", **WSD)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_one_minus_sqrt_in_closed_form():
    """At a quarter of the decay half of the way is done, at 9/16 three quarters."""
    rates = [
        lr_at(step, lr=1.0, min_lr=0.2, warmup_steps=0, total_steps=40, decay_steps=16, shape="1-sqrt")
        for step in (24, 28, 33, 40)
    ]
    assert rates == pytest.approx([1.0, 0.6, 0.4, 0.2], rel=1e-12)


@given(
    warmup=st.integers(0, 20),
    stable=st.integers(0, 20),
    decay=st.integers(0, 60),
    ratio=st.floats(0, 1),
    shape=st.sampled_from(DECAY_SHAPES),
)
def test_the_rate_is_continuous_and_falls(warmup, stable, decay, ratio, shape):
    total, lr = warmup + stable + decay, 0.5
    settings = {"lr": lr, "min_lr": ratio * lr, "warmup_steps": warmup, "total_steps": total, "shape": shape}
    rates = [lr_at(step, decay_steps=decay, **settings) for step in range(total + 1)]
    assert all(rate == pytest.approx(lr) for rate in rates[warmup : warmup + stable + (decay > 0)])
    assert rates[total] == pytest.approx(ratio * lr if decay else lr)
    steepest = {"linear": 1 / max(decay, 1), "cosine": math.pi / 2 / max(decay, 1), "1-sqrt": max(decay, 1) ** -0.5}
    falls = [before - after for before, after in zip(rates[warmup:], rates[warmup + 1 :], strict=False)]
    assert all(-1e-12 <= fall <= lr * (1 - ratio) * steepest[shape] + 1e-12 for fall in falls)
    if stable == 0:
        assert rates == [lr_at(step, **settings) for step in range(total + 1)]  # all after the warm-up, the default


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


class Mixed(nn.Module):
    """What a language model has: matrices and stacks of them, embeddings, a norm, stacked biases."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(0.3 * torch.randn(4, 6, 6))
        self.experts_bias = nn.Parameter(torch.zeros(4, 6))
        self.frozen = nn.Parameter(torch.zeros(5, 4), requires_grad=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + self.down(self.up(x).tanh()))
        return (torch.einsum("td,eod->teo", x, self.experts) + self.experts_bias).square().mean()


HIDDEN = {"up.weight", "down.weight", "experts"}
MUON = OptimConfig(algorithm="muon", lr=0.02, weight_decay=0.1, momentum=0.9, adamw_lr_scale=0.5)


def muon(model, config=MUON):
    return build_optimizer(model, config, {"experts_bias"}, HIDDEN)


def train(model, optimizer, steps):
    for step in steps:
        set_rate(optimizer, 0.02 / (1 + step))
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(7, (11,), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(left, right):
    return all(torch.equal(*pair) for pair in zip(left.parameters(), right.parameters(), strict=True))


def test_muon_groups():
    model = Mixed()
    names = {parameter: name for name, parameter in model.named_parameters()}
    told = [([names[p] for p in g["params"]], g["weight_decay"], g["lr"]) for g in muon(model).param_groups]
    assert told == [
        (["up.weight", "down.weight"], 0.1, 0.02),
        (["experts"], 0.1, 0.02),
        (["embedding.weight"], 0.1, 0.01),
        (["experts_bias", "up.bias", "norm.weight", "norm.bias"], 0.0, 0.01),
    ]


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_combined_steps_as_its_parts_do(scale):
    model, apart = Mixed(), Mixed()
    train(
        model,
        muon(model, OptimConfig(algorithm="muon", momentum=0.9, muon_scale=scale, adamw_lr_scale=0.5)),
        range(4),
    )
    settings = {"momentum": 0.9, "weight_decay": 0.05, "adjust_lr_fn": scale}
    decay, none = (
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in (
            ([apart.embedding.weight], 0.05),
            ([apart.experts_bias, apart.up.bias, *apart.norm.parameters()], 0.0),
        )
    )
    optimizers = (
        torch.optim.Muon([apart.up.weight, apart.down.weight], **settings),
        StackedMuon([apart.experts], **settings),
        torch.optim.AdamW([decay, none], betas=(0.9, 0.95), fused=True),
    )
    for step in range(4):
        apart(torch.randint(7, (11,), generator=torch.Generator().manual_seed(step))).backward()
        for optimizer, factor in zip(optimizers, (1, 1, 0.5), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * 0.02 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, apart) and not same(model, Mixed())


def test_muon_resumes_from_a_checkpoint_bit_by_bit(tmp_path):
    through, stopped, resumed = Mixed(), Mixed(), Mixed(seed=1)
    optimizer = muon(through)
    train(through, optimizer, range(7))
    half = muon(stopped)
    train(stopped, half, range(3))
    path = checkpoint.save(tmp_path, {"step": 3}, checkpoint.snapshot(stopped, half, {}), keep=1)
    other = muon(resumed)
    train(resumed, other, range(2))  # so that there is something to overwrite
    checkpoint.load(path, resumed, other)
    assert same(resumed, stopped)
    train(resumed, other, range(3, 7))
    assert same(resumed, through)
    for one, two in zip(resumed.parameters(), through.parameters(), strict=True):
        left, right = other.state.get(one, {}), optimizer.state.get(two, {})
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_state_dict_and_copy():
    model = Mixed()
    optimizer = muon(model)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    fresh = muon(twin)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's shares its tensors
    both, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 5))
    train(twin, fresh, range(2, 5))
    train(both, copied, range(2, 5))
    assert same(model, twin) and same(model, both)


def test_combined_shares_groups_and_state():
    optimizer = muon(Mixed())
    for state in (None, optimizer.state_dict()):
        if state is not None:
            optimizer.load_state_dict(state)
        inner = [group for one in optimizer.optimizers for group in one.param_groups]
        assert all(group is own for group, own in zip(optimizer.param_groups, inner, strict=True))
        assert all(one.state is optimizer.state for one in optimizer.optimizers)


def test_combined_refuses_a_group_that_nothing_would_step():
    with pytest.raises(ValueError, match="added to one of the optimizers, before"):
        muon(Mixed()).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_combined_refuses_a_parameter_that_two_would_step():
    weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined([torch.optim.SGD([weight]), torch.optim.Muon([weight])])


def test_combined_calls_a_closure_once():
    model, calls = Mixed(), []
    optimizer = muon(model)

    def closure():
        calls.append(model(torch.arange(7)))
        calls[-1].backward()
        return calls[-1]

    assert optimizer.step(closure) is calls[0] and len(calls) == 1 and not same(model, Mixed())


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (
            None,
            "optim.algorithm is 'muon'; it must be 'adamw' here, since the task names no hidden matrices of Mixed",
        ),
        (set(), "optim.algorithm is 'muon'"),
        ({"up.weights"}, r"hidden_matrices names \['up.weights'\], which are not trainable parameters of Mixed"),
        ({"frozen"}, r"hidden_matrices names \['frozen'\]"),
        (
            {"down.weight", "up.bias"},
            r"hidden_matrices names 'up.bias' of shape \(9,\); allowed are matrices \(A, B\)",
        ),
    ],
    ids=["none", "empty", "unknown", "frozen", "vector"],
)
def test_muon_needs_hidden_matrices(hidden, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(Mixed(), MUON, hidden_matrices=hidden)


def test_muon_alone_spares_what_is_not_to_decay():
    model = nn.Linear(3, 4, bias=False)
    (group,) = build_optimizer(model, MUON, {"weight"}, {"weight"}).param_groups
    assert group["params"] == [model.weight] and group["weight_decay"] == 0


def test_adamw_has_no_use_for_hidden_matrices():
    optimizer = build_optimizer(Mixed(), OptimConfig(), hidden_matrices=HIDDEN)
    assert type(optimizer) is torch.optim.AdamW


def test_muon_is_described():
    told = describe_groups(muon(Mixed()))
    assert told == (
        "Muon (update 0.2 sqrt(max(A, B))): 2 matrices (108) and 1 stacks of 4 (144) with weight decay 0.1; "
        "AdamW: 1 tensors (42) with weight decay 0.1; 4 tensors (45) without; rates scaled by 0.5"
    )
    plain = OptimConfig(algorithm="muon", weight_decay=0.0, muon_scale="original")
    assert describe_groups(muon(Mixed(), plain)) == (
        "Muon (update sqrt(max(1, A / B))): 2 matrices (108) and 1 stacks of 4 (144) without weight decay; "
        "AdamW: 5 tensors (87) without weight decay"
    )
