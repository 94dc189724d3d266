"""The mixture that Inductor compiles behind the scenes: right, compiled once for all sizes, missed without harm."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

import moa_ffn
from moa_ffn import FFN, FFNSpec
from moa_ffn.backends import compiled, cpu
from moa_ffn.backends.reference import mixture

ENOUGH = 2**10  # tokens, with a hidden width of 2**6 or more


@pytest.fixture
def compiling(monkeypatch):
    """Compilation switched on; without a compiler the test is skipped."""
    monkeypatch.delenv(compiled.SWITCH)
    reason = compiled.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


def make(variant: str, hidden: int, **settings) -> FFN:
    torch.manual_seed(0)
    ffn = FFN(24, hidden, variant, bias=True, mix_init_std=0.5, backend="cpu", **settings)
    ffn.init_weights(lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5))
    return ffn


def written_out(ffn: FFN, x: torch.Tensor) -> torch.Tensor:
    b = None if ffn.up_proj is None else ffn.up_proj(x)
    hidden = mixture(ffn.gate_proj(x), b, ffn.mixing(x), ffn.spec.gate_dictionary, ffn.spec.up_dictionary)
    return ffn.down_proj(hidden)


def results(function, ffn, x) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *ffn.parameters()])]


def relative_rms(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


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
def test_equals_the_written_out_formula_at_every_size(compiling, variant, settings, monkeypatch):
    monkeypatch.setattr(cpu, "HIDDEN_ELEMENTS", 2**17)  # several blocks of tokens
    for hidden, tokens in ((2**6, ENOUGH), (67, 5 * ENOUGH + 1)):
        ffn = make(variant, hidden, **settings)
        x = torch.randn(tokens, ffn.dim)
        actual = results(ffn, ffn, x)
        ffn.double()
        for ours, theirs in zip(actual, results(partial(written_out, ffn), ffn, x.double()), strict=True):
            assert relative_rms(ours, theirs) < 1e-5


def test_is_compiled_once_for_all_sizes(compiling):
    compiled._compiled.cache_clear()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for hidden, tokens in ((64, ENOUGH), (67, ENOUGH + 3), (129, 2 * ENOUGH)):
        make("swiglu", hidden)(torch.randn(3, tokens, 24)).sum().backward()
    with torch.no_grad():
        make("swiglu", 64)(torch.randn(ENOUGH, 24))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # forward and backward


def test_few_tokens_are_not_worth_a_compilation(monkeypatch):
    monkeypatch.delenv(compiled.SWITCH)
    monkeypatch.setattr(compiled, "unavailable_reason", lambda: pytest.fail("asked whether it could compile"))
    ffn = make("qdmoa", 64)
    assert FFN.choose_backend(ffn, torch.randn(ENOUGH - 1, 24)) == "cpu"
    ffn(torch.randn(ENOUGH - 1, 24)).sum().backward()


@pytest.fixture
def without_compiler(monkeypatch):
    """A machine where Inductor finds no C++ compiler, as seen from the function that tries it."""
    monkeypatch.delenv(compiled.SWITCH)
    compiled._tried.cache_clear()

    def refuse(*arguments, **settings):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", refuse)
    yield
    compiled._tried.cache_clear()


def test_without_a_compiler_it_does_without_and_says_so_once(without_compiler, caplog):
    ffn, x = make("qdmoa", 64), torch.randn(ENOUGH, 24)
    with caplog.at_level(logging.WARNING, "moa_ffn"):
        out = ffn(x)
    assert torch.allclose(out, written_out(ffn, x), atol=1e-5)
    (record,) = caplog.records
    assert "InvalidCxxCompiler: No working C++ compiler found" in record.message
    assert "\n" not in record.message


def test_the_switch_is_obeyed_in_silence(monkeypatch, caplog):
    monkeypatch.setenv(compiled.SWITCH, "0")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    make("qdmoa", 64)(torch.randn(ENOUGH, 24))
    assert not caplog.records


def test_inference_mode_and_threads_change_nothing(compiling):
    ffn, x = make("swiglu", 64), torch.randn(ENOUGH, 24)
    expected, threads = ffn(x), torch.get_num_threads()
    with torch.inference_mode():
        assert torch.equal(ffn(x), expected)
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(ffn(x), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_mixture_alone_of_rows_that_others_projected(compiling):
    spec = FFNSpec("qdmoa")
    a, b = (torch.randn(4, ENOUGH, 64, requires_grad=True) for _ in range(2))
    mix = torch.randn(4, ENOUGH, spec.num_coefficients, requires_grad=True)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("eager", torch.float64)):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (a, b, mix)]
        out = moa_ffn.mixture(*tensors, spec, backend)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), tensors[0])
        results.append([out, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert relative_rms(ours, theirs) < 1e-5


def test_a_bare_mixture_says_why_it_cannot_be_compiled():
    a = torch.randn(ENOUGH, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run: .*not torch\.bfloat16 on cpu"):
        moa_ffn.mixture(a, a, None, FFNSpec("swiglu"), "cpu")
    expected = torch.nn.functional.silu(a) * a
    assert torch.equal(moa_ffn.mixture(a, a, None, FFNSpec("swiglu")), expected)
