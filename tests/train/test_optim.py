"""Parameter groups, and Muon with AdamW as one optimizer."""

import pytest
import torch
from torch import nn

from moa_train import checkpoint
from moa_train.checkpoint import TrainState
from moa_train.config import OptimConfig
from moa_train.errors import ConfigError
from moa_train.muon import Muon
from moa_train.optim import build_optimizer, set_rate


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mix_coef = nn.Parameter(torch.zeros(3, 2))
        self.fixed = nn.Parameter(torch.zeros(5, 4), requires_grad=False)


def test_adamw():
    model = Model()
    optimizer = build_optimizer(model, OptimConfig(lr=3e-4, weight_decay=0.1), {"mix_coef"})
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [([names[p] for p in group["params"]], group["weight_decay"]) for group in optimizer.param_groups] == [
        (["token", "conv.weight"], 0.1),
        (["mix_coef", "conv.bias", "norm.weight", "norm.bias"], 0.0),
    ]
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["fused"]
    assert not build_optimizer(Model(), OptimConfig(fused=False)).defaults["fused"]


class Mixed(nn.Module):
    """The kinds of parameters of a language model with experts."""

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
    groups = [([names[p] for p in g["params"]], g["weight_decay"], g["lr"]) for g in muon(model).param_groups]
    assert groups == [
        (["experts", "up.weight", "down.weight"], 0.1, 0.02),
        (["embedding.weight"], 0.1, 0.01),
        (["experts_bias", "up.bias", "norm.weight", "norm.bias"], 0.0, 0.01),
    ]


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_combined_steps_like_its_parts(scale):
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
        Muon([apart.experts, apart.up.weight, apart.down.weight], **settings),
        torch.optim.AdamW([decay, none], betas=(0.9, 0.95), fused=True),
    )
    for step in range(4):
        apart(torch.randint(7, (11,), generator=torch.Generator().manual_seed(step))).backward()
        for optimizer, factor in zip(optimizers, (1, 0.5), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * 0.02 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, apart) and not same(model, Mixed())


def test_muon_resumes_bit_exactly_from_a_checkpoint(tmp_path):
    through, stopped, resumed = Mixed(), Mixed(), Mixed(seed=1)
    optimizer = muon(through)
    train(through, optimizer, range(7))
    half = muon(stopped)
    train(stopped, half, range(3))
    path = checkpoint.save(tmp_path, TrainState(3).__dict__, checkpoint.snapshot(stopped, half, {}), keep_latest=1)
    other = muon(resumed)
    train(resumed, other, range(2))
    checkpoint.load(path, resumed, other)
    assert same(resumed, stopped)
    train(resumed, other, range(3, 7))
    assert same(resumed, through)
    for one, two in zip(resumed.parameters(), through.parameters(), strict=True):
        left, right = other.state.get(one, {}), optimizer.state.get(two, {})
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_muon_needs_hidden_matrices():
    with pytest.raises(ConfigError, match="must be 'adamw': Mixed has no hidden matrices"):
        build_optimizer(Mixed(), MUON)
