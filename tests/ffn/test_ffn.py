"""The layer against the written-out formula, closed forms, torch's own modules and float64 finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moa_ffn import (
    ACTIVATIONS,
    FFN,
    GATES,
    VARIANTS,
    Activation,
    Coefficients,
    FFNSpec,
    activations,
    register_activation,
)
from moa_ffn.backends import cpu, eager
from moa_ffn.backends.reference import mixture

DIM, HIDDEN = 6, 10
TOKEN_VARIANTS = [v for v in VARIANTS if FFNSpec(v).token_adaptive]
CONSTANT_VARIANTS = [v for v in VARIANTS if FFNSpec(v).learned_constant]


def make(variant: str, **settings) -> FFN:
    """An FFN with weights of scale 1/sqrt(fan_in), so that every term matters."""
    settings = {"dtype": torch.float64, "bias": True, "mix_init_std": 0.5, **settings}
    ffn = FFN(DIM, HIDDEN, variant, **settings)
    ffn.init_weights(lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5))
    for name, parameter in ffn.named_parameters():
        if name.endswith("bias") or name == "mix_coef":
            nn.init.normal_(parameter)
    return ffn


def written_out(ffn: FFN, x: Tensor) -> Tensor:
    b = None if ffn.up_proj is None else ffn.up_proj(x)
    hidden = mixture(ffn.gate_proj(x), b, ffn.mixing(x), ffn.spec.gate_dictionary, ffn.spec.up_dictionary)
    return ffn.down_proj(hidden)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    scale = expected.double().square().mean().sqrt().clamp_min(1e-30)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()


MIXTURES = [
    *((variant, {}) for variant in VARIANTS),
    *((variant, {"mixing_gate": gate}) for variant in ("moa", "onemoa", "bimoa", "qdmoa") for gate in GATES[1:]),
    *((variant, {"mixed_branch": "up"}) for variant in ("onela", "onemoa")),
    ("qdmoa", {"mix_bias": True}),
]


@pytest.mark.parametrize(("variant", "settings"), MIXTURES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(variant, settings, backend):
    ffn = make(variant, backend=backend, **settings)
    x = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ffn.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(ffn, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *ffn.parameters()))


@pytest.mark.parametrize("variant", ["moa", "bimoa", "qdmoa"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_second_derivatives(variant, backend):
    ffn = make(variant, backend=backend)
    ffn.down_proj.requires_grad_(False)
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ffn, (x,))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("size", [HIDDEN, 3 * HIDDEN, 2**22], ids=["one token", "uneven blocks", "one block"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_equals_the_written_out_formula(variant, shape, size, backend, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", size // 2)
    monkeypatch.setattr(cpu, "HIDDEN_ELEMENTS", size)
    ffn = make(variant, backend=backend)
    x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (ffn, lambda x: written_out(ffn, x)):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *ffn.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_lower_precision(variant, dtype, tolerance):
    # hidden wide enough that the rounding of a single term does not decide the figure
    a, b = (torch.randn(64, 128, dtype=dtype).requires_grad_() for _ in range(2))
    spec = FFNSpec(variant)
    ffn = FFN(16, 128, variant, dtype=dtype, mix_init_std=0.25)
    ffn.gate_proj, ffn.down_proj = nn.Identity(), nn.Identity()  # the mixture alone; the rest is nn.Linear
    x = torch.randn(64, 16, dtype=dtype)
    factors = ffn.coefficients(x).map(lambda c: c.detach().clone().requires_grad_())
    leaves = [a, *([b] if spec.type_two else []), *(c for c in factors if c is not None)]
    out = eager.mixture(a, b if spec.type_two else None, *factors, spec.gate_dictionary, spec.up_dictionary)
    upstream = torch.randn_like(out)
    actual = [out, *torch.autograd.grad(out, leaves, upstream)]

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    a64, *rest = exact
    b64 = rest.pop(0) if spec.type_two else None
    gate, up, pair = factors
    gate64, up64, pair64 = (rest.pop(0) if c is not None else None for c in (gate, up, pair))
    if pair64 is None:
        one = a64.new_ones(64, 1)
        pair64 = (one if gate64 is None else gate64)[:, :, None] * (one if up64 is None else up64)[:, None, :]
    expected_out = mixture(a64, b64, pair64, spec.gate_dictionary, spec.up_dictionary)
    expected = [expected_out, *torch.autograd.grad(expected_out, exact, upstream.double())]
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_rms(got, want) < tolerance


FUNCTIONS = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if FFNSpec(v).num_coefficients])
def test_one_hot_coefficients_give_the_plain_ffn(variant, monkeypatch):
    ffn = make(variant)
    spec, x = ffn.spec, torch.randn(5, DIM, dtype=torch.float64)
    k1, k2 = len(spec.gate_dictionary), max(1, len(spec.up_dictionary))
    for k, l in itertools.product(range(k1), range(k2)):  # noqa: E741  # the paper's indices
        factors = ffn.coefficients(x)
        one_hot = {
            "gate": None if factors.gate is None else F.one_hot(torch.full((5,), k), k1).double(),
            "up": None if factors.up is None else F.one_hot(torch.full((5,), l), k2).double(),
            "pair": None
            if factors.pair is None
            else F.one_hot(torch.full((5,), k * k2 + l), k1 * k2).view(5, k1, k2).double(),
        }
        coefficients = Coefficients(**one_hot)
        monkeypatch.setattr(ffn, "coefficients", lambda _, c=coefficients: c)
        hidden = FUNCTIONS[spec.gate_dictionary[k]](ffn.gate_proj(x))
        if ffn.up_proj is not None:
            hidden = hidden * FUNCTIONS[spec.up_dictionary[l]](ffn.up_proj(x))
        torch.testing.assert_close(ffn(x), ffn.down_proj(hidden))
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("constant", "token"), [("la", "moa"), ("onela", "onemoa"), ("bila", "bimoa"), ("qdla", "qdmoa")]
)
def test_la_equals_moa_with_constant_gates(constant, token):
    la, moa = make(constant), make(token, mix_bias=True)
    moa.load_state_dict(la.state_dict(), strict=False)
    alphas = torch.rand(la.spec.num_coefficients, dtype=torch.float64) * 0.8 + 0.1
    with torch.no_grad():
        la.mix_coef.copy_(alphas)
        moa.mix_proj.weight.zero_()
        moa.mix_proj.bias.copy_(alphas.logit())
    x = torch.randn(4, DIM, dtype=torch.float64)
    torch.testing.assert_close(la(x), moa(x))


def test_swiglu_is_llamas_mlp():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(
        LlamaConfig(hidden_size=DIM, num_attention_heads=1, num_key_value_heads=1, intermediate_size=HIDDEN)
    ).double()
    ours = FFN(DIM, HIDDEN, "swiglu", dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gelu_is_timms_mlp():
    from timm.layers import Mlp

    theirs = Mlp(DIM, HIDDEN).double()
    ours = FFN(DIM, HIDDEN, "gelu", bias=True, dtype=torch.float64)
    renamed = {k.replace("fc1", "gate_proj").replace("fc2", "down_proj"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    x = torch.randn(3, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mix_bias", [False, True])
def test_extra_parameters_match_the_formula(variant, mix_bias):
    spec = FFNSpec(variant, mix_bias=mix_bias)
    base = {False: "gelu", True: "swiglu"}[spec.type_two]
    counts = [sum(p.numel() for p in FFN(DIM, HIDDEN, v, mix_bias=mix_bias).parameters()) for v in (variant, base)]
    ffn = FFN(DIM, HIDDEN, variant, mix_bias=mix_bias)
    assert counts[0] - counts[1] == spec.extra_parameters(DIM) == ffn.mixing_parameters()
    # K1 = 3 and K2 = 2 by default: the closed forms of the paper's O(d) claim
    vectors = {"moa": 3, "onemoa": 3, "bimoa": 5, "qdmoa": 6}.get(variant, 0)
    scalars = {"la": 3, "onela": 3, "bila": 5, "qdla": 6}.get(variant, 0)
    assert spec.extra_parameters(DIM) == vectors * (DIM + mix_bias) + scalars


def test_paper_budget_of_the_012b_model():
    # paper.md: bi-MoA 0.11980B against 0.11974B at d = 768 and 12 layers, rounded to 10^4
    extra = 12 * FFNSpec("bimoa").extra_parameters(768)
    assert abs(extra - (0.11980e9 - 0.11974e9)) <= 1.5e4


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from([*TOKEN_VARIANTS, *CONSTANT_VARIANTS]),
    f=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, max_size=4, unique=True),
    g=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, max_size=4, unique=True),
    gate=st.sampled_from(GATES),
    branch=st.sampled_from(["gate", "up"]),
    hidden=st.integers(1, 9),
)
def test_any_dictionary(variant, f, g, gate, branch, hidden):
    ffn = FFN(
        3,
        hidden,
        variant,
        mixing_gate=gate,
        gate_activations=f,
        up_activations=g,
        mixed_branch=branch,
        dtype=torch.float64,
    )
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    actual, expected = ffn(x), written_out(ffn, x)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["la", "bimoa", "qdmoa", "swiglu"])
def test_non_contiguous_inputs(variant):
    ffn = make(variant)
    base = torch.randn(DIM, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(ffn(base.transpose(0, 2)), ffn(base.transpose(0, 2).contiguous()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_saves_only_branches_and_coefficients(variant, backend):
    ffn = FFN(16, 64, variant, backend=backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ffn(torch.randn(32, 16, requires_grad=True))
    wide = {t.data_ptr() for t in saved if t.shape == (32, 64)}
    # a, b and, where down_proj is a call of its own, its input
    assert len(wide) == 1 + ffn.spec.type_two + (backend == "eager")
    assert not [t for t in saved if t.numel() > 32 * 64]


@pytest.mark.parametrize("variant", ["gelu", "moa", "swiglu", "bila", "qdmoa"])
def test_compiles_and_exports_whole(variant):
    torch._dynamo.reset()
    ffn = make(variant)
    x = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    parameters = [x, *ffn.parameters()]
    plain = [ffn(x), *torch.autograd.grad(ffn(x).sum(), parameters)]
    out = compiled(x)
    for got, want in zip([out, *torch.autograd.grad(out.sum(), parameters)], plain, strict=True):
        torch.testing.assert_close(got, want)
    exported = torch.export.export(ffn, (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), plain[0])


@pytest.mark.parametrize("variant", ["moa", "qdmoa", "bila"])
@pytest.mark.parametrize("gate", GATES)
def test_autocast_keeps_bfloat16(variant, gate):
    ffn = FFN(16, 32, variant, mixing_gate=gate)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ffn(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, ffn(x)) < 2e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ffn.parameters())


def test_initialization():
    torch.manual_seed(0)
    ffn = FFN(256, 512, "qdmoa", bias=True, mix_bias=True, mix_init_std=0.1)
    assert math.isclose(ffn.gate_proj.weight.std().item(), 0.02, rel_tol=0.05)
    assert math.isclose(ffn.mix_proj.weight.std().item(), 0.1, rel_tol=0.1)
    assert not any(p.any() for n, p in ffn.named_parameters() if n.endswith("bias"))
    assert FFN(4, 4, "qdla", coef_init=0.25).mix_coef.eq(0.25).all()
    half = FFN(4, 4, "bimoa", mix_init_std=0).mixing(torch.randn(2, 4))
    assert half.eq(0.25).all()  # sigmoid(0)^2


def test_dropout_is_active_in_training_only():
    ffn = FFN(16, 64, "swiglu", drop=0.5)
    x = torch.ones(4, 16)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_table_entries_agree_with_autograd(name):
    entry = ACTIVATIONS[name]
    x = torch.linspace(-3, 3, 48, dtype=torch.float64).requires_grad_()  # 0 is not among them
    (slope,) = torch.autograd.grad(entry.function(x).sum(), x)
    torch.testing.assert_close(entry.derivative(x.detach()), slope)
    upstream = torch.randn_like(x)
    for enabled in (True, False):  # the differentiable form and torch's backward kernel
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(entry.vjp(upstream, x.detach()), upstream * slope)
    torch.testing.assert_close(entry.function(x), FUNCTIONS[name](x))


def test_a_user_can_add_an_activation(monkeypatch):
    for table in ("ACTIVATIONS", "_BY_ABBREVIATION"):
        monkeypatch.setattr(activations, table, dict(getattr(activations, table)))
    entry = Activation("sine", "sin", torch.sin, torch.cos)
    register_activation(entry)
    with pytest.raises(ValueError, match="already in the table"):
        register_activation(entry)
    assert activations.resolve_activations("sin, t", "gate_activations") == ("sine", "tanh")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "geglu"}, "variant='geglu'.*qdmoa"),
        ({"mixing_gate": "relu"}, "mixing_gate='relu'.*softmax"),
        ({"gate_activations": ("g", "swish")}, r"gate_activations.*'swish'.*silu \(s\)"),
        ({"up_activations": ("t", "tanh")}, "up_activations.*twice"),
        ({"mixed_branch": "down"}, "mixed_branch='down'"),
        ({"backend": "cuda"}, "backend='cuda'.*eager"),
        ({"mix_init_std": -1.0}, "mix_init_std"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FFN(DIM, HIDDEN, **settings)
    with pytest.raises(ValueError, match="dim=0"):
        FFN(0, HIDDEN)


def test_names_and_abbreviations_are_one():
    assert FFNSpec("qdmoa", gate_activations=("g", "s", "r2"), up_activations=("id", "t")) == FFNSpec("qdmoa")
    assert FFN(4, 4, gate_activations="r, l").spec.gate_dictionary == ("relu", "leaky_relu")
