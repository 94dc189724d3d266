"""The layer against the written-out formula, closed forms, other libraries' layers and float64 finite differences."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN, XIELUActivation

from moa_ffn import ACTIVATIONS, FFN, GATES, VARIANTS, Activation, FFNSpec, activations, register_activation
from moa_ffn.backends import cpu, eager, reference

DIM, HIDDEN = 6, 10
X = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MIXED_VARIANTS = [variant for variant in VARIANTS if FFNSpec(variant).num_coefficients]
MIXTURES = [
    *((variant, {}) for variant in VARIANTS),
    *((variant, {"mixing_gate": gate}) for variant in ("moa", "onemoa", "bimoa", "qdmoa") for gate in GATES[1:]),
    *((variant, {"mixed_branch": "up"}) for variant in ("onela", "onemoa")),
    ("qdmoa", {"mix_bias": True}),
    ("bimoa", {"mix_pool": True}),
    ("qdmoa", {"gate_activations": ("xi", "pn"), "up_activations": ("id", "sw")}),
    ("bimoa", {"gate_activations": ("pau", "g"), "up_activations": ("pn", "xi")}),
    *((variant, {"mix_base": "anchor"}) for variant in ("la", "moa", "qdla", "bimoa", "qdmoa")),
    *(("bimoa", {"mix_base": "anchor", "mixing_gate": gate}) for gate in GATES[1:]),
    ("onemoa", {"mix_base": "anchor", "mixed_branch": "up", "anchor": "gelu", "mixing_gate": "softmax"}),
]
FUNCTIONS = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": ACT2FN["quick_gelu"],
}


def make(variant: str, **settings) -> FFN:
    """Return an FFN with weights of scale 1/sqrt(fan_in), so that every term matters."""
    ffn = FFN(DIM, HIDDEN, variant, **{"dtype": torch.float64, "bias": True, "mix_init_std": 0.5, **settings})
    ffn.init_weights(lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5))
    for name, parameter in ffn.named_parameters():
        if name == "act_param":
            parameter.data += 0.1 * torch.randn_like(parameter)
        if name.endswith("bias") or name == "mix_coef" or (name == "mix_proj.weight" and ffn.spec.anchored):
            nn.init.normal_(parameter)
    return ffn


def output_and_gradients(function, x: Tensor, parameters) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *parameters])]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("variant", "settings"), MIXTURES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(variant, settings, backend):
    ffn = make(variant, backend=backend, **settings)
    names = [name for name, _ in ffn.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(ffn, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (X[:3].clone().requires_grad_(), *ffn.parameters()))


@pytest.mark.parametrize("variant", ["moa", "bimoa", "qdmoa"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_second_derivatives(variant, backend):
    ffn = make(variant, backend=backend)
    ffn.down_proj.requires_grad_(False)
    assert torch.autograd.gradgradcheck(ffn, (X[:2].clone().requires_grad_(),))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("block", [HIDDEN, 3 * HIDDEN, 2**22], ids=["one token", "uneven blocks", "one block"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_equals_the_formula(variant, shape, block, backend, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", block // 2)
    monkeypatch.setattr(cpu, "HIDDEN_ELEMENTS", block)
    ffn, x = make(variant, backend=backend), torch.randn(*shape, DIM, dtype=torch.float64)
    actual = output_and_gradients(ffn, x, ffn.parameters())
    expected = output_and_gradients(lambda x: reference.ffn(ffn, x), x, ffn.parameters())
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(MIXED_VARIANTS),
    f=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, max_size=4, unique=True),
    g=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, max_size=4, unique=True),
    gate=st.sampled_from(GATES),
    branch=st.sampled_from(["gate", "up"]),
)
def test_any_dictionary(variant, f, g, gate, branch):
    options = {"mixing_gate": gate, "gate_activations": f, "up_activations": g, "mixed_branch": branch}
    ffn = make(variant, **options)
    actual = output_and_gradients(ffn, X, ffn.parameters())
    expected = output_and_gradients(lambda x: reference.ffn(ffn, x), X, ffn.parameters())
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision(variant, dtype, tolerance):
    """The mixture alone, in a width where the rounding of a single term does not dominate."""
    exact = FFN(128, 128, variant, mix_init_std=0.05, backend="eager").double()
    exact.gate_proj, exact.down_proj = nn.Identity(), nn.Identity()
    if exact.up_proj is not None:
        exact.up_proj = nn.Tanh()
    rounded = FFN(128, 128, variant, mix_init_std=0.05, backend="eager", dtype=dtype)
    rounded.gate_proj, rounded.up_proj, rounded.down_proj = exact.gate_proj, exact.up_proj, exact.down_proj
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())  # the rounded weights
    x = torch.randn(64, 128).to(dtype)
    actual = output_and_gradients(rounded, x, rounded.parameters())
    expected = output_and_gradients(lambda x: reference.ffn(exact, x), x.double(), exact.parameters())
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_rms(got, want) < tolerance


@pytest.mark.parametrize("gate", GATES)
def test_mixing_matrix(gate):
    """C(x) by hand from the mixing vectors of bi-MoA and qd-MoA."""
    nonlinearity = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softmax": lambda logits: logits.softmax(-1)}[gate]
    separable, full = make("bimoa", mixing_gate=gate), make("qdmoa", mixing_gate=gate)
    logits = X @ separable.mix_proj.weight.T
    outer = torch.einsum("nk,nl->nkl", nonlinearity(logits[:, :3]), nonlinearity(logits[:, 3:]))
    torch.testing.assert_close(separable.mixing(X), outer)
    torch.testing.assert_close(full.mixing(X), nonlinearity(X @ full.mix_proj.weight.T).view(5, 3, 2))


def test_pooled_coefficients_are_those_of_the_mean_token():
    pooled, ffn, x = make("qdmoa", mix_pool=True), make("qdmoa"), torch.randn(2, 5, DIM, dtype=torch.float64)
    ffn.load_state_dict(pooled.state_dict())
    expected = ffn.mixing(x.mean(1)).unsqueeze(1).expand(2, 5, 3, 2)
    torch.testing.assert_close(pooled.mixing(x), expected)
    torch.testing.assert_close(pooled(x), reference.ffn(pooled, x))
    torch.testing.assert_close(pooled(x[1]), pooled(x)[1])  # sequences do not mix


@pytest.mark.parametrize("variant", ["la", "onela", "bila", "qdla"])
def test_one_hot_coefficients_give_a_plain_ffn(variant):
    ffn = make(variant)
    k2 = max(1, len(ffn.spec.up_dictionary))
    for k, f in enumerate(ffn.spec.gate_dictionary):
        for l, g in enumerate(ffn.spec.up_dictionary or ("identity",)):  # noqa: E741  # the paper's indices
            one_hot = torch.zeros(ffn.spec.num_coefficients, dtype=torch.float64)
            one_hot[k * k2 + l if variant == "qdla" else k] = 1
            if variant == "bila":
                one_hot[len(ffn.spec.gate_dictionary) + l] = 1
            ffn.mix_coef.data = one_hot
            hidden = FUNCTIONS[f](ffn.gate_proj(X))
            if ffn.up_proj is not None:
                hidden = hidden * FUNCTIONS[g](ffn.up_proj(X))
            torch.testing.assert_close(ffn(X), ffn.down_proj(hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("variant", "anchor", "settings"),
    [
        *((variant, "gelu", {}) for variant in ("la", "moa")),
        *((variant, "silu", {}) for variant in ("onela", "bila", "qdla", "onemoa", "bimoa", "qdmoa")),
        *((variant, "relu2", {"mixed_branch": "up", "anchor": "relu2"}) for variant in ("onela", "onemoa", "qdmoa")),
    ],
    ids=str,
)
def test_anchored_layer_starts_as_the_pretrained_ffn(variant, anchor, settings, gate, dtype):
    ffn = FFN(DIM, HIDDEN, variant, mixing_gate=gate, mix_base="anchor", backend="eager", dtype=dtype, **settings)
    ffn.init_weights(nn.init.normal_)
    assert sorted(ffn.mixing(X.to(dtype))[0].flatten().tolist()) == [0.0] * (len(ffn.spec.terms) - 1) + [1.0]
    a, b = ffn.gate_proj(X.to(dtype)), 1 if ffn.up_proj is None else ffn.up_proj(X.to(dtype))
    out = ffn(X.to(dtype))
    torch.testing.assert_close(
        out, ffn.down_proj(FUNCTIONS[anchor](a) * b), rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0
    )
    out.sum().backward()
    assert all(p.grad.ne(0).any() for p in ffn.parameters())


def test_anchor_must_be_in_the_dictionary():
    with pytest.raises(ValueError, match="mix_base='anchor' needs 'silu' in gate_activations=gelu,relu"):
        FFNSpec("qdmoa", gate_activations=("g", "r"), mix_base="anchor")


@pytest.mark.parametrize(
    ("constant", "token"), [("la", "moa"), ("onela", "onemoa"), ("bila", "bimoa"), ("qdla", "qdmoa")]
)
def test_la_equals_moa_with_constant_gates(constant, token):
    la, moa = make(constant), make(token, mix_bias=True)
    moa.load_state_dict(la.state_dict(), strict=False)
    coefficients = torch.rand(la.spec.num_coefficients, dtype=torch.float64) * 0.8 + 0.1
    with torch.no_grad():
        la.mix_coef.copy_(coefficients)
        moa.mix_proj.weight.zero_()
        moa.mix_proj.bias.copy_(coefficients.logit())
    torch.testing.assert_close(la(X), moa(X))


def test_swiglu_is_llamas_mlp():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=DIM, num_attention_heads=1, num_key_value_heads=1, intermediate_size=HIDDEN)
    llama, ffn = LlamaMLP(config).double(), make("swiglu", bias=False)
    ffn.load_state_dict(llama.state_dict())
    torch.testing.assert_close(ffn(X), llama(X))


def test_gelu_is_timms_mlp():
    from timm.layers import Mlp

    mlp, ffn = Mlp(DIM, HIDDEN).double(), make("gelu")
    names = {"fc1": "gate_proj", "fc2": "down_proj"}
    ffn.load_state_dict({f"{names[k[:3]]}{k[3:]}": v for k, v in mlp.state_dict().items()})
    torch.testing.assert_close(ffn(X), mlp(X))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mix_bias", [False, True])
def test_extra_parameters(variant, mix_bias):
    spec = FFNSpec(variant, mix_bias=mix_bias)
    base = "swiglu" if spec.type_two else "gelu"
    ffn, plain = (FFN(DIM, HIDDEN, name, mix_bias=mix_bias) for name in (variant, base))
    count, plain_count = (sum(p.numel() for p in module.parameters()) for module in (ffn, plain))
    # K1 = 3 and K2 = 2 by default: the closed forms of the paper's O(d) claim
    vectors = {"moa": 3, "onemoa": 3, "bimoa": 5, "qdmoa": 6}.get(variant, 0)
    scalars = {"la": 3, "onela": 3, "bila": 5, "qdla": 6, "swish": 1, "xielu": 2, "polynorm": 4, "pau": 10}.get(
        variant, 0
    )
    assert count - plain_count == vectors * (DIM + mix_bias) + scalars
    assert count - plain_count == spec.extra_parameters(DIM) == ffn.mixing_parameters()


def test_paper_parameter_count_of_the_012b_model():
    """bi-MoA 0.11980B against 0.11974B at d = 768 and 12 layers, rounded to 10^4 in the paper."""
    extra = 12 * FFNSpec("bimoa").extra_parameters(768)
    assert abs(extra - (0.11980e9 - 0.11974e9)) <= 1.5e4


def test_shares_sum_to_one_and_follow_the_activations():
    ffn = make("qdmoa", gate_activations="identity", up_activations="identity,relu")
    with torch.no_grad():
        ffn.mix_proj.weight.zero_()  # equal coefficients
    shares = ffn.shares(X).squeeze(-2)
    torch.testing.assert_close(shares.sum(-1), torch.ones(5, dtype=torch.float64))
    a, b = ffn.gate_proj(X), X @ ffn.up_proj.weight.T + ffn.up_proj.bias
    sizes = torch.stack([(a * b).square().mean(-1).sqrt(), (a * b.relu()).square().mean(-1).sqrt()], -1)
    torch.testing.assert_close(shares, sizes / sizes.sum(-1, keepdim=True))


@pytest.mark.parametrize("variant", ["la", "bimoa", "qdmoa", "swiglu"])
def test_non_contiguous_input(variant):
    ffn, x = make(variant), torch.randn(DIM, 5, 2, dtype=torch.float64).transpose(0, 2)
    torch.testing.assert_close(ffn(x), ffn(x.contiguous()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_saved_tensors(variant, backend):
    ffn = FFN(16, 64, variant, backend=backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ffn(torch.randn(32, 16, requires_grad=True))
    wide = {t.data_ptr() for t in saved if t.shape == (32, 64)}
    assert len(wide) == 1 + ffn.spec.type_two + (backend == "eager")  # a, b and eager's input of down_proj
    assert not [t for t in saved if t.numel() > 32 * 64]


@pytest.mark.parametrize("variant", ["gelu", "moa", "swiglu", "bila", "qdmoa"])
def test_compiles_without_graph_breaks(variant):
    torch._dynamo.reset()
    ffn = make(variant)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(output_and_gradients(f, X, ffn.parameters()) for f in (compiled, ffn)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["moa", "qdmoa", "bila"])
@pytest.mark.parametrize("gate", GATES)
def test_autocast_returns_bfloat16(variant, gate):
    ffn, x = FFN(16, 32, variant, mixing_gate=gate), torch.randn(8, 16)
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


def test_dropout_in_training_only():
    ffn, x = FFN(16, 64, "swiglu", drop=0.5), torch.ones(4, 16)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize("name", sorted(name for name, entry in ACTIVATIONS.items() if not entry.parameters))
def test_activation_table_agrees_with_autograd(name):
    entry = ACTIVATIONS[name]
    x = torch.linspace(-3, 3, 48, dtype=torch.float64).requires_grad_()  # without 0
    (slope,) = torch.autograd.grad(entry.function(x).sum(), x)
    torch.testing.assert_close(entry.function(x), FUNCTIONS[name](x))
    assert entry.derivative is not None
    torch.testing.assert_close(entry.derivative(x.detach()), slope)
    upstream = torch.randn_like(x)
    for enabled in (True, False):  # the differentiable form and torch's backward kernel
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(entry.vjp(upstream, x.detach()), upstream * slope)


def test_trainable_activations_are_those_of_the_papers():
    """Values at the initial parameters, and for other ones."""
    x = torch.linspace(-3, 3, 48, dtype=torch.float64)
    theirs = XIELUActivation(dtype=torch.float64)
    p, n = theirs.alpha_p.data, theirs.alpha_n.data
    assert torch.tensor(ACTIVATIONS["xielu"].parameters).allclose(torch.cat([p, n]).float())
    torch.testing.assert_close(ACTIVATIONS["xielu"].function(x, p, n), theirs(x), rtol=0, atol=1e-6)  # their eps
    swish, slope = ACTIVATIONS["swish"], torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(swish.function(x, slope), x / (1 + torch.exp(-1.7 * x)))
    *weights, bias = torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)
    normalized = [F.rms_norm(x**i, x.shape, eps=1e-6) for i in (1, 2, 3)]
    polynorm = sum(w * power for w, power in zip(weights, normalized, strict=True)) + bias
    torch.testing.assert_close(ACTIVATIONS["polynorm"].function(x, *weights, bias), polynorm)
    pau = ACTIVATIONS["pau"]
    initial = torch.tensor(pau.parameters, dtype=torch.float64)
    rational = numpy.polyval(pau.parameters[5::-1], x) / (1 + abs(numpy.polyval((*pau.parameters[:5:-1], 0), x)))
    torch.testing.assert_close(pau.function(x, *initial), torch.as_tensor(rational))
    torch.testing.assert_close(pau.function(x, *initial), F.leaky_relu(x), rtol=0, atol=0.07)  # what they fitted


def test_register_activation(monkeypatch):
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
        ({"variant": "mish"}, "variant='mish'.*qdmoa"),
        ({"mixing_gate": "relu"}, "mixing_gate='relu'.*softmax"),
        ({"gate_activations": ("g", "mish")}, r"gate_activations.*'mish'.*silu \(s\)"),
        ({"gate_activations": 3}, "gate_activations=3 must be names"),
        ({"up_activations": ("t", "tanh")}, "up_activations.*twice"),
        ({"mixed_branch": "down"}, "mixed_branch='down'"),
        ({"backend": "cuda"}, "backend='cuda'.*eager"),
        ({"mix_init_std": -1.0}, "mix_init_std"),
        ({"dim": 0}, "dim=0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FFN(**{"dim": DIM, "hidden_dim": HIDDEN, **settings})


def test_abbreviations():
    assert FFNSpec("qdmoa", gate_activations=("g", "s", "r2"), up_activations=("id", "t")) == FFNSpec("qdmoa")
    assert FFN(4, 4, gate_activations="r, l").spec.gate_dictionary == ("relu", "leaky_relu")
