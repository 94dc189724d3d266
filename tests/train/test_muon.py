"""Muon against torch's, matrix by matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moa_train import muon
from moa_train.muon import (
    COEFFICIENTS,
    EPS,
    ITERATIONS,
    UPDATE_SCALES,
    Muon,
    orthogonalize,
    orthogonalize_flops,
)

ROUNDING = 1e-2
"""Relative error of an update in bfloat16, which has 8 bits of precision."""


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", list(UPDATE_SCALES))
@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (2, 1, 7)], ids=str)
def test_stack_steps_like_its_matrices(shape, scale):
    torch.manual_seed(0)
    weights = 0.1 * torch.randn(shape)
    stack, matrices = nn.Parameter(weights.clone()), [nn.Parameter(weight.clone()) for weight in weights]
    settings = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": scale}
    ours, theirs = Muon([stack], **settings), torch.optim.Muon(matrices, **settings)
    for _ in range(4):
        stack.grad = torch.randn(shape)
        for matrix, gradient in zip(matrices, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        before = torch.stack(matrices).detach()
        ours.step()
        theirs.step()
        after = torch.stack(matrices).detach()
        assert relative_error(stack.detach() - before, after - before) < ROUNDING
        with torch.no_grad():
            stack.copy_(after)  # do not accumulate the error
    buffers = torch.stack([theirs.state[matrix]["momentum_buffer"] for matrix in matrices])
    assert ours.state[stack].keys() == {"momentum_buffer"}
    assert torch.equal(ours.state[stack]["momentum_buffer"], buffers)


@pytest.mark.parametrize("limit", [2**24, 2000])
def test_matrices_of_one_shape_step_together(limit, monkeypatch):
    """Two matrices 24 x 40 and a stack of three such: all five at once, or one by one where they exceed the limit."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", limit)
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (3, 24, 40), (24, 40), (24, 40)]
    ours = [nn.Parameter(0.1 * torch.randn(shape)) for shape in shapes]
    ours[-1].requires_grad_(False)
    theirs = [[nn.Parameter(w.clone()) for w in each.detach().view(-1, *each.shape[-2:])] for each in ours]
    optimizer, reference = Muon(ours, lr=0.1), torch.optim.Muon([w for own in theirs for w in own], lr=0.1)
    before = [each.detach().clone() for each in ours]
    for each, own in zip(ours[:-1], theirs, strict=False):
        each.grad = torch.randn(each.shape)
        for w, gradient in zip(own, each.grad.view(-1, *each.shape[-2:]), strict=True):
            w.grad = gradient.clone()
    products = []
    monkeypatch.setattr(muon, "orthogonalize", lambda x: products.append(len(x)) or orthogonalize(x))
    optimizer.step()
    reference.step()
    for each, own, start in zip(ours[:-1], theirs, before, strict=False):
        expected = torch.stack([w.detach() for w in own]).view(each.shape)
        assert relative_error(each.detach() - start, expected - start) < ROUNDING
    assert torch.equal(ours[-1], before[-1])
    assert sorted(products) == ([1, 5] if limit == 2**24 else [1, 1, 1, 3])


def test_defaults_match_torch():
    defaults = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).defaults
    names = ("ns_coefficients", "ns_steps", "eps", "nesterov")
    assert [defaults[name] for name in names] == [COEFFICIENTS, ITERATIONS, EPS, True]
    ours = Muon([nn.Parameter(torch.zeros(1, 2, 2))]).defaults
    assert ours == {name: defaults[name] or "original" for name in ours}


def stack_of(singular_values, rows, columns, seed):
    """Return U, V and a stack U S V^T of matrices with the given singular values (R,), in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(3, size, len(singular_values), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return u, v, u * torch.tensor(singular_values, dtype=torch.float64) @ v.mT


@settings(deadline=None)
@given(
    singular_values=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    size=st.floats(1e-4, 1e4),
)
def test_singular_values_follow_the_quintic(singular_values, extra, size):
    rows, columns = (len(singular_values) + more for more in extra)
    u, v, matrices = stack_of(singular_values, rows, columns, seed=rows * 100 + columns)
    found = u.mT @ orthogonalize(size * matrices).double() @ v
    expected = np.array(singular_values) / np.linalg.norm(singular_values)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        expected = a * expected + b * expected**3 + c * expected**5
    assert expected.min() > 0.68 and expected.max() < 1.16
    error = (found - torch.diag(torch.from_numpy(expected))).abs().max()
    assert error < 0.12  # bfloat16: up to 0.08; one iteration more or less: 0.2 to 0.4


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (5, 96, 32)], ids=str)
def test_flops_match_torch_counter(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(shape).view(-1, *shape[-2:]))
    assert counter.get_total_flops() == orthogonalize_flops(shape)


def test_expert_without_gradient_follows_its_momentum():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.ones(2, 4, 6))
    optimizer = Muon([stack], lr=0.1, weight_decay=0.5)
    stack.grad = torch.randn(2, 4, 6)
    stack.grad[1] = 0
    optimizer.step()
    assert torch.equal(stack[1], torch.full((4, 6), 1 - 0.1 * 0.5)) and not torch.equal(stack[0], stack[1])
    before = stack.detach().clone()
    stack.grad.zero_()
    optimizer.step()
    assert torch.linalg.svdvals((before - stack.detach())[0] - 0.05 * before[0]).min() > 0.06  # rate x about 1
