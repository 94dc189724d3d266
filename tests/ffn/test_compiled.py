"""The mixture compiled by Inductor inside the CPU backend."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

import moa_ffn
from moa_ffn import FFN, FFNSpec
from moa_ffn.backends import compiled, cpu, reference

TOKENS = 2**10
"""Enough tokens for compilation at a hidden width of 64 or more."""


@pytest.fixture
def compiling(monkeypatch):
    """Enable compilation; skip without a compiler."""
    monkeypatch.delenv(compiled.SWITCH)
    reason = compiled.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


def make(variant: str, hidden: int = 64, **settings) -> FFN:
    torch.manual_seed(0)
    ffn = FFN(24, hidden, variant, bias=True, mix_init_std=0.5, backend="cpu", **settings)
    ffn.init_weights(lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5))
    return ffn


def output_and_gradients(function, ffn, x) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *ffn.parameters()])]


def assert_close(actual, expected) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        pytest.param("gelu", {}, marks=pytest.mark.slow),
        pytest.param("moa", {"gate_activations": "g,s,r,r2,l,t,id"}, marks=pytest.mark.slow),
        pytest.param("bimoa", {"mixing_gate": "softmax"}, marks=pytest.mark.slow),
        ("qdmoa", {}),
        pytest.param("qdla", {}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_formula(compiling, variant, settings, monkeypatch):
    monkeypatch.setattr(cpu, "HIDDEN_ELEMENTS", 2**17)  # several blocks of tokens
    for hidden, tokens in ((64, TOKENS), (67, 5 * TOKENS + 1)):
        ffn, x = make(variant, hidden, **settings), torch.randn(tokens, 24)
        actual = output_and_gradients(ffn, ffn, x)
        ffn.double()
        assert_close(actual, output_and_gradients(partial(reference.ffn, ffn), ffn, x.double()))


def test_compiles_once_for_all_sizes(compiling):
    compiled._compiled.cache_clear()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for hidden, tokens in ((64, TOKENS), (67, TOKENS + 3), (129, 2 * TOKENS)):
        make("swiglu", hidden)(torch.randn(3, tokens, 24)).sum().backward()
    with torch.no_grad():
        make("swiglu")(torch.randn(TOKENS, 24))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # forward and backward


def test_inference_mode_and_threads_do_not_change_results(compiling):
    ffn, x = make("swiglu"), torch.randn(TOKENS, 24)
    expected, threads = ffn(x), torch.get_num_threads()
    with torch.inference_mode():
        assert torch.equal(ffn(x), expected)
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(ffn(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_bare_mixture_has_two_derivatives(compiling):
    spec = FFNSpec("qdmoa")
    shapes = ((4, TOKENS, 64), (4, TOKENS, 64), (4, TOKENS, spec.num_coefficients))
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for backend, dtype in (("cpu", torch.float32), ("eager", torch.float64)):
        tensors = [t.to(dtype).requires_grad_() for t in inputs]
        out = moa_ffn.mixture(*tensors, spec, backend)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        results.append([out, *first, *torch.autograd.grad(first[0].square().sum(), tensors[0])])
    assert_close(*results)


def test_few_tokens_are_not_compiled(monkeypatch):
    monkeypatch.delenv(compiled.SWITCH)
    monkeypatch.setattr(compiled, "unavailable_reason", lambda: pytest.fail("asked whether it could compile"))
    ffn, x = make("qdmoa"), torch.randn(TOKENS - 1, 24)
    assert ffn.choose_backend(x) == "cpu"
    ffn(x).sum().backward()


def test_missing_compiler_is_one_warning(monkeypatch, caplog):
    def refuse(*arguments, **settings):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.delenv(compiled.SWITCH)
    monkeypatch.setattr(torch, "compile", refuse)
    compiled._tried.cache_clear()
    ffn, x = make("qdmoa"), torch.randn(TOKENS, 24)
    with caplog.at_level(logging.WARNING, "moa_ffn"):
        outputs = [ffn(x), ffn(x)]
    compiled._tried.cache_clear()
    torch.testing.assert_close(outputs[1], reference.ffn(ffn, x), atol=1e-5, rtol=1e-5)
    (record,) = caplog.records
    assert "InvalidCxxCompiler: No working C++ compiler found" in record.message and "\n" not in record.message


def test_environment_variable_disables_compilation(monkeypatch, caplog):
    monkeypatch.setenv(compiled.SWITCH, "0")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    make("qdmoa")(torch.randn(TOKENS, 24))
    assert not caplog.records


def test_bare_mixture_in_bfloat16_is_eager():
    a = torch.randn(TOKENS, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run: .*not torch\.bfloat16 on cpu"):
        moa_ffn.mixture(a, a, None, FFNSpec("swiglu"), "cpu")
    assert torch.equal(moa_ffn.mixture(a, a, None, FFNSpec("swiglu")), nn.functional.silu(a) * a)
