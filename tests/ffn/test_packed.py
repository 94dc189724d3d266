"""The GPU backend of the whole layer against the plain form in float64; without a GPU in Triton's interpreter."""

import pytest
import torch
from torch import nn

from moa_ffn import FFN, VARIANTS, mixture
from moa_ffn.backends import triton as kernels
from moa_ffn.backends.triton.layer import ALIGNMENT, project

pytest.importorskip("triton")
DIM, HIDDEN, TOKENS = 12, 18, 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def results(ffn: FFN, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x, *(parameter for parameter in ffn.parameters() if parameter.requires_grad)]
    out = ffn(x)
    return [out, *torch.autograd.grad(out.sin().sum(), wanted)]


def assert_equals_plain_form(ffn: FFN, x: torch.Tensor, tolerance: float = 2e-5) -> None:
    # 2e-5: Triton 3.6's interpreter is off by 1.5e-5, that of 3.9 by less than 1e-5
    actual = results(ffn, x)
    ffn.double().backend = "eager"
    for ours, theirs in zip(actual, results(ffn, x.double()), strict=True):
        assert ours.shape == theirs.shape
        assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_form(variant, bias):
    assert_equals_plain_form(make(variant, bias=bias, mix_bias=bias), tokens(2, 3))


@pytest.mark.parametrize("shape", [(), (1,), (0, 2)], ids=str)
def test_one_token_and_none(shape):
    ffn, x = make("qdmoa"), tokens(*shape)
    assert ffn(x).shape == x.shape
    if x.numel():
        assert_equals_plain_form(ffn, x)
    else:
        assert all((gradient == 0).all() for gradient in results(ffn, x)[2:])


@pytest.mark.parametrize("frozen", ["gate_proj", "down_proj", "mix"])
def test_frozen_parts(frozen):
    ffn = make("qdmoa", bias=True)
    for name, parameter in ffn.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_equals_plain_form(ffn, tokens(TOKENS))


def test_other_projections_are_called_as_what_they_are():
    ffn, called = make("qdmoa"), []
    ffn.up_proj.register_forward_hook(lambda *_: called.append("up_proj"))
    assert_equals_plain_form(ffn, tokens(TOKENS))
    assert called


def test_dropout_stands_where_it_stood():
    ffn, x = make("qdmoa", drop=0.5), tokens(TOKENS)
    torch.manual_seed(0)
    ours = ffn(x)
    ffn.backend = "eager"
    torch.manual_seed(0)
    assert torch.allclose(ours, ffn(x), atol=1e-5)
    assert (ours == 0).any()


def test_autocast_computes_in_its_dtype():
    ffn, x = make("qdmoa"), tokens(TOKENS)
    expected = ffn(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = ffn(x)
    assert out.dtype == torch.bfloat16
    assert ((out - expected).norm() / expected.norm()).item() < 2e-2
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ffn.parameters())


@pytest.mark.parametrize("variant", ["swiglu", "qdmoa", "relu2", "moa"])
def test_nothing_activated_is_saved(variant):
    ffn, saved = make(variant), []
    x = tokens(TOKENS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ffn(x)
    per_token = {tuple(t.shape) for t in saved if t.shape[0] == TOKENS}
    width = (1 + ffn.spec.type_two) * HIDDEN + ffn.spec.num_coefficients
    assert per_token == {(TOKENS, DIM), (TOKENS, width + -width % ALIGNMENT)}


def test_the_product_is_padded_with_zeros():
    linears = [nn.Linear(DIM, 5), nn.Linear(DIM, 6, bias=False)]
    x = torch.randn(TOKENS, DIM)
    product = project(x, linears)
    assert product.shape == (TOKENS, ALIGNMENT)
    torch.testing.assert_close(product[:, :11], torch.cat([linear(x) for linear in linears], 1))
    assert (product[:, 11:] == 0).all()


def test_is_traced_without_a_break():
    ffn, x = make("qdmoa"), tokens(TOKENS).requires_grad_()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    ours, expected = (torch.autograd.grad(call(x).sum(), [x, *ffn.parameters()]) for call in (compiled, ffn))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dtype_that_kernels_lack_is_refused_by_name_and_left_by_auto():
    ffn, x = make("qdmoa").double(), tokens(TOKENS).double()
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: .*not torch\.float64"):
        ffn(x)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        mixture(x, x, x[:, :6], ffn.spec, "triton")
    ffn.backend = "auto"
    assert ffn.choose_backend(x) != "triton"


def test_the_interpreter_is_never_chosen_by_itself():
    ffn = make("qdmoa")
    assert kernels.unavailable_reason(tokens(TOKENS), ffn.spec) is None
    ffn.backend = "auto"
    assert ffn.choose_backend(tokens(TOKENS)) == ("triton" if DEVICE.type == "cuda" else "cpu")
