"""The GPU backend of the whole layer against eager in float64, without a GPU in Triton's interpreter."""

import pytest
import torch
from torch import nn

from moa_ffn import FFN, VARIANTS, mixture
from moa_ffn.backends import triton as kernels
from moa_ffn.backends.triton.layer import ALIGNMENT, project

pytest.importorskip("triton")
DIM, HIDDEN, TOKENS = 12, 18, 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def make(variant: str, **settings) -> FFN:
    torch.manual_seed(0)
    ffn = FFN(DIM, HIDDEN, variant, backend="triton", device=DEVICE, **settings)
    for name, parameter in ffn.named_parameters():
        nn.init.normal_(parameter, std=1 if name.endswith("bias") else DIM**-0.5)
    return ffn


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def output_and_gradients(ffn: FFN, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x, *(parameter for parameter in ffn.parameters() if parameter.requires_grad)]
    out = ffn(x)
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


def assert_equals_eager(ffn: FFN, x: torch.Tensor) -> None:
    actual = output_and_gradients(ffn, x)
    ffn.double().backend = "eager"
    for got, want in zip(actual, output_and_gradients(ffn, x.double()), strict=True):
        assert got.shape == want.shape
        assert ((got - want).norm() / want.norm()).item() < 2e-5  # the interpreter of Triton 3.6 is off by 1.5e-5


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "polynorm"])  # a function of rows
@pytest.mark.parametrize("bias", [False, True])
def test_equals_eager(variant, bias):
    assert_equals_eager(make(variant, bias=bias, mix_bias=bias), tokens(2, 3))


def test_one_token():
    assert_equals_eager(make("qdmoa"), tokens())


def test_no_tokens():
    out, _, *gradients = output_and_gradients(make("qdmoa"), tokens(0, 2))
    assert out.shape == (0, 2, DIM)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["gate_proj", "down_proj", "mix"])
def test_frozen_parameters(frozen):
    ffn = make("qdmoa", bias=True)
    for name, parameter in ffn.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_equals_eager(ffn, tokens(TOKENS))


def test_hooked_projections_are_called():
    ffn, called = make("qdmoa"), []
    ffn.up_proj.register_forward_hook(lambda *_: called.append("up_proj"))
    assert_equals_eager(ffn, tokens(TOKENS))
    assert called


def test_dropout_equals_eager():
    ffn, x, outputs = make("qdmoa", drop=0.5), tokens(TOKENS), []
    for ffn.backend in ("triton", "eager"):
        torch.manual_seed(0)
        outputs.append(ffn(x))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert (outputs[0] == 0).any()


def test_autocast():
    ffn, x = make("qdmoa"), tokens(TOKENS)
    expected = ffn(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = ffn(x)
    assert out.dtype == torch.bfloat16
    assert ((out - expected).norm() / expected.norm()).item() < 2e-2
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ffn.parameters())


@pytest.mark.parametrize("variant", ["swiglu", "qdmoa", "relu2", "moa"])
def test_saves_input_and_product_only(variant):
    ffn, saved, x = make(variant), [], tokens(TOKENS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ffn(x)
    width = (1 + ffn.spec.type_two) * HIDDEN + ffn.spec.num_coefficients
    per_token = {tuple(t.shape) for t in saved if t.shape[0] == TOKENS}
    assert per_token == {(TOKENS, DIM), (TOKENS, width + -width % ALIGNMENT)}


def test_product_is_padded_with_zeros():
    linears = [nn.Linear(DIM, 5), nn.Linear(DIM, 6, bias=False)]
    x = torch.randn(TOKENS, DIM)
    product = project(x, linears)
    torch.testing.assert_close(product[:, :11], torch.cat([linear(x) for linear in linears], 1))
    assert product.shape == (TOKENS, ALIGNMENT) and not product[:, 11:].any()


def test_compiles_without_graph_breaks():
    ffn, x = make("qdmoa"), tokens(TOKENS).requires_grad_()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(call(x).sum(), [x, *ffn.parameters()]) for call in (compiled, ffn))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_unsupported_dtype():
    ffn, x = make("qdmoa").double(), tokens(TOKENS).double()
    for call in (lambda: ffn(x), lambda: mixture(x, x, x[:, :6], ffn.spec, "triton")):
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            call()
    ffn.backend = "auto"
    assert ffn.choose_backend(x) != "triton"


def test_auto_never_selects_the_interpreter():
    ffn = make("qdmoa")
    assert kernels.unavailable_reason(tokens(TOKENS), ffn.spec) is None
    ffn.backend = "auto"
    assert ffn.choose_backend(tokens(TOKENS)) == ("triton" if DEVICE.type == "cuda" else "cpu")
