"""Stacks of matrices are stepped as torch's Muon steps each of their matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moa_train.muon import (
    COEFFICIENTS,
    EPS,
    ITERATIONS,
    UPDATE_SCALES,
    StackedMuon,
    orthogonalize,
    orthogonalize_flops,
)

ROUNDING = 1e-2
"""Relative error of an update: bfloat16 keeps 8 bits (0.4 %), and a batched product may sum in another order."""


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", list(UPDATE_SCALES))
@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (4, 32, 32), (2, 1, 7), (1, 9, 1)], ids=str)
def test_a_stack_is_stepped_as_its_matrices_are(shape, scale):
    torch.manual_seed(0)
    weights = 0.1 * torch.randn(shape)
    stack, matrices = nn.Parameter(weights.clone()), [nn.Parameter(weight.clone()) for weight in weights]
    settings = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": scale}
    ours, theirs = StackedMuon([stack], **settings), torch.optim.Muon(matrices, **settings)
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
            stack.copy_(after)  # or the error of one step would be part of the next one's
    buffers = torch.stack([theirs.state[matrix]["momentum_buffer"] for matrix in matrices])
    assert ours.state[stack].keys() == {"momentum_buffer"}
    assert torch.equal(ours.state[stack]["momentum_buffer"], buffers)


def test_constants_are_those_of_torch():
    defaults = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).defaults
    names = ("ns_coefficients", "ns_steps", "eps", "nesterov")
    assert [defaults[name] for name in names] == [COEFFICIENTS, ITERATIONS, EPS, True]
    ours = StackedMuon([nn.Parameter(torch.zeros(1, 2, 2))]).defaults
    assert ours == {name: defaults[name] or "original" for name in ours}


def stack_of(singular_values, rows, columns, seed):
    """A stack of matrices with the same given singular values (R,), in float64: U, V and U S V^T."""
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
def test_singular_vectors_stay_and_values_go_through_the_quintic(singular_values, extra, size):
    rows, columns = (len(singular_values) + more for more in extra)
    u, v, matrices = stack_of(singular_values, rows, columns, seed=rows * 100 + columns)
    found = u.mT @ orthogonalize(size * matrices).double() @ v
    expected = np.array(singular_values) / np.linalg.norm(singular_values)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        expected = a * expected + b * expected**3 + c * expected**5
    assert expected.min() > 0.68 and expected.max() < 1.16
    error = (found - torch.diag(torch.from_numpy(expected))).abs().max()
    assert error < 0.12  # bfloat16 makes up to 0.08; an iteration more or less, 0.2 to 0.4


@pytest.mark.parametrize("shape", [(4, 96, 32), (4, 32, 96), (4, 48, 64)], ids=str)
def test_the_result_is_orthogonal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.6 and values.max() < 1.3


SHAPES = [(96, 32), (32, 96), (48, 48), (1, 7), (5, 96, 32), (5, 32, 96), (3, 48, 48), (1, 9, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(shape).view(-1, *shape[-2:]))  # a matrix is a stack of one
    assert counter.get_total_flops() == orthogonalize_flops(shape)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
def test_torchs_muon_takes_as_many(shape):
    matrix = nn.Parameter(torch.ones(shape))
    matrix.grad = torch.ones(shape)
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon([matrix]).step()
    assert counter.get_total_flops() == orthogonalize_flops(shape)


@pytest.mark.parametrize("shape", [(2, 16, 128), (2, 128, 16), (2, 40, 64)], ids=str)
def test_the_update_has_the_size_of_adamws(shape):
    """0.2, whatever the shape: the Frobenius norm of U V^T is sqrt(min(A, B))."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.zeros(shape))
    stack.grad = torch.randn(shape)
    StackedMuon([stack], lr=1.0, adjust_lr_fn="match_rms_adamw").step()
    assert stack.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_each_matrix_is_on_its_own():
    torch.manual_seed(0)
    gradients = torch.randn(3, 12, 20)
    updates = []
    for factor in (1.0, 1000.0, torch.inf):
        stack = nn.Parameter(torch.zeros(3, 12, 20))
        stack.grad = gradients * torch.tensor([1.0, factor, 1.0]).view(3, 1, 1)
        StackedMuon([stack]).step()
        updates.append(stack.detach())
    alike, larger, infinite = updates
    assert torch.equal(alike[[0, 2]], larger[[0, 2]]) and torch.equal(alike[[0, 2]], infinite[[0, 2]])
    assert relative_error(larger[1], alike[1]) < 4 * ROUNDING and infinite[1].isnan().all()


def test_an_expert_without_a_gradient_is_only_decayed_and_then_follows_its_momentum():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.ones(2, 4, 6))
    optimizer = StackedMuon([stack], lr=0.1, weight_decay=0.5)
    stack.grad = torch.randn(2, 4, 6)
    stack.grad[1] = 0
    optimizer.step()
    assert torch.equal(stack[1], torch.full((4, 6), 1 - 0.1 * 0.5)) and not torch.equal(stack[0], stack[1])
    before = stack.detach().clone()
    stack.grad.zero_()
    optimizer.step()
    assert torch.linalg.svdvals((before - stack.detach())[0] - 0.05 * before[0]).min() > 0.06  # rate x about 1


def test_a_parameter_without_gradient_is_left_alone():
    stack = nn.Parameter(torch.ones(2, 3, 4))
    optimizer = StackedMuon([stack])
    optimizer.step()
    assert torch.equal(stack, torch.ones(2, 3, 4)) and not optimizer.state


def test_closure():
    stack = nn.Parameter(torch.ones(2, 3, 4))
    optimizer = StackedMuon([stack], lr=0.1)

    def closure():
        loss = stack.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 24 and (stack < 1).all()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)], ids=str)
def test_a_parameter_that_is_no_stack_is_refused(shape):
    with pytest.raises(ValueError, match=r"has the shape \(.*stack of matrices \(E, A, B\)"):
        StackedMuon([nn.Parameter(torch.zeros(shape))])


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="adjust_lr_fn is 'rms'; it must be one of match_rms_adamw, original"):
        StackedMuon([nn.Parameter(torch.zeros(1, 2, 3))], adjust_lr_fn="rms")
