"""Dispatch against one-hot matrix products, for many numbers of tokens, experts and choices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moa_lm import expert_blocks
from moa_lm.dispatch import (
    choose_method,
    combine,
    dispatch,
    group_by_expert,
    project_in,
    project_out,
)
from moa_train.errors import ConfigError


@st.composite
def assignments(draw) -> tuple[Tensor, int]:
    """indices (N, k) and E; the choices of a token differ, and experts may be unused."""
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 7))
    k = draw(st.integers(1, experts))
    choice = st.permutations(range(experts)).map(lambda order: order[:k])
    return torch.tensor([draw(choice) for _ in range(tokens)], dtype=torch.int64).view(tokens, k), experts


CPU_METHODS = ("blocks", "grouped", "loop")


@settings(max_examples=25, deadline=None)
@given(assignments(), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans())
def test_projections_equal_einsum(drawn, width, widths, with_bias):
    """Every method, in and out, with all gradients."""
    indices, experts = drawn
    (n, k), groups = indices.shape, group_by_expert(indices, experts)
    x, scales = torch.randn(n, width), torch.randn(n, k)
    weights = [torch.randn(experts, outputs, width) for outputs in widths]
    biases = [torch.randn(experts, outputs) for outputs in widths] if with_bias else []
    down, down_bias = torch.randn(experts, width, widths[0]), torch.randn(experts, width)
    inputs = [t.requires_grad_() for t in (x, scales, down, down_bias, *weights, *biases)]
    used = inputs if with_bias else [t for t in inputs if t is not down_bias]
    choice = torch.nn.functional.one_hot(indices, experts).float()  # (N, k, E)

    def exact():
        parts = [torch.einsum("nd,nke,eod->nko", x, choice, weight) for weight in weights]
        parts = [part + choice @ bias for part, bias in zip(parts, biases, strict=True)] if biases else parts
        out = torch.einsum("nko,nke,edo,nk->nd", parts[0].sin(), choice, down, scales)
        out = out + torch.einsum("nke,ed,nk->nd", choice, down_bias, scales) if with_bias else out
        return [part.flatten(0, 1)[groups.order] for part in parts], out

    def ours(method):
        maps = list(zip(weights, biases or [None] * len(weights), strict=True))
        parts = project_in(x, maps, groups, method)
        return parts, project_out(parts[0].sin(), down, down_bias if with_bias else None, scales, groups, method)

    def results(parts, out):
        loss = out.cos().sum() + sum(part.cos().sum() for part in parts)
        return [*parts, out, *torch.autograd.grad(loss, used)]

    wanted = results(*exact())
    for method in CPU_METHODS:
        torch.testing.assert_close(results(*ours(method)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [7, 0])
def test_custom_operators_pass_opcheck(tokens):
    """Schema, fake results and autograd registration."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(tokens, 4, generator=generator).argsort(-1)[:, :2]
    groups = group_by_expert(indices, 5)  # expert 4 has no token
    x = torch.randn(tokens, 6)
    hidden, down = torch.randn(2 * tokens, 3), torch.randn(5, 6, 3)
    weights = [torch.randn(5, 3, 6), torch.randn(5, 2, 6)]
    x, hidden, down, *weights = (t.requires_grad_() for t in (x, hidden, down, *weights))
    places = (expert_blocks.row_tokens(groups.order, 2), groups.ends)
    operators = torch.ops.moa_lm
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiled whole in test_moe.py
    torch.library.opcheck(operators.project_in, (x, weights, *places), test_utils=tests)
    torch.library.opcheck(operators.project_out, (hidden, down, *places, tokens), test_utils=tests)


def test_flops_are_those_of_the_products():
    groups = group_by_expert(torch.tensor([[0, 1], [1, 2], [0, 2]]), 3)
    x, weight, scales = torch.randn(3, 4), torch.randn(3, 5, 4, requires_grad=True), torch.rand(3, 2)
    down = torch.randn(3, 4, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (a,) = project_in(x.requires_grad_(), [(weight, None)], groups, "blocks")
        out = project_out(a, down, None, scales, groups, "blocks")
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * 6 * 5 * 4  # of six assignments
    assert forward == 2 * product and counter.get_total_flops() == 6 * product


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("tokens", [2, 0])
def test_non_contiguous_gradients(width, tokens):
    groups = group_by_expert(torch.tensor([[0, 1], [1, 0]])[:tokens], 2)
    weight = torch.randn(2, width, 8, requires_grad=True)
    grads = []
    for method in CPU_METHODS:
        (out,) = project_in(torch.ones(tokens, 8), [(weight, None)], groups, method)
        grads.append(torch.autograd.grad(out.sum(), weight)[0])  # the gradient of sum is expanded, with strides 0
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_choices_are_float32(dtype):
    """1 + 256 * 2^-9 is 1.5; in half precision each addend would be lost or rounded."""
    k = 257
    groups = group_by_expert(torch.arange(k).view(1, k), k)
    weights = torch.full((1, k), 2.0**-9)
    weights[0, 0] = 1.0
    out = combine(torch.ones(k, 1, dtype=dtype), weights, groups)
    assert out.dtype == dtype and out.item() == 1.5
    x = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    dispatch(x, groups).backward(weights.T.to(dtype))
    assert x.grad.dtype == dtype and x.grad.item() == 1.5


def test_auto_takes_the_first_available_method():
    cpu = torch.device("cpu")
    assert choose_method("auto", cpu, torch.float64) == "blocks"
    assert choose_method("auto", cpu, torch.bfloat16) == "grouped"
    assert choose_method("auto", torch.device("mps"), torch.bfloat16) == "loop"
    assert choose_method("loop", cpu, torch.float32) == "loop"


@pytest.mark.parametrize(("method", "dtype"), [("grouped", torch.float64), ("blocks", torch.bfloat16)])
def test_unavailable_method_raises(method, dtype):
    with pytest.raises(ConfigError, match=rf"expert_dispatch is '{method}', which is unavailable for {dtype} on cpu"):
        choose_method(method, torch.device("cpu"), dtype)
