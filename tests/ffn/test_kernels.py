"""The fused kernels against the formula in float64: in Triton's interpreter, and with `-m gpu` on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from moa_ffn import (
    ACTIVATIONS,
    GATES,
    VARIANTS,
    Activation,
    FFNSpec,
    activations,
    mixing_coefficients,
    register_activation,
)
from moa_ffn.backends import reference
from moa_ffn.backends import triton as kernels
from moa_ffn.backends.triton import build, operators
from moa_ffn.backends.triton.source import Mixture
from moa_ffn.coefficients import Coefficients

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
COLUMNS = 37
"""Odd, and more than one block in the interpreter."""

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
KERNELS = [name for name, entry in ACTIVATIONS.items() if entry.kernel]
SPECS = [FFNSpec(variant) for variant in VARIANTS if variant != "polynorm"]
SPECS += [FFNSpec("bimoa", gate_activations=("g", "xi"), up_activations=("pau", "id"))]
SPECS += [FFNSpec("qdmoa", gate_activations=("sw", "xi"), up_activations=("id", "sw"))]
SPECS += [FFNSpec(spec.variant, gate) for spec in SPECS if spec.token_adaptive for gate in GATES[1:]]
SPECS += [FFNSpec(variant, mixed_branch="up") for variant in ("onela", "onemoa")]
SPECS += [FFNSpec("bimoa", gate, mix_base="anchor") for gate in GATES] + [
    FFNSpec("qdmoa", "softmax", mix_base="anchor")
]
ONE_OF_EACH = ["relu2", "swiglu", "moa", "onela", "bimoa", "qdla", "qdmoa"]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Device of the tensors; kernels run in the interpreter for "cpu". Uninitialized memory holds NaN."""
    pytest.importorskip("triton")  # before TRITON_INTERPRET is set, so that Triton's own functions stay compiled
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(build, "WARP", 4)  # blocks of 16 to 64 columns
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic algorithms
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield "cpu" if request.param == "interpreter" else "cuda"
    torch.use_deterministic_algorithms(before)


def inputs(spec: FFNSpec, device, shape=(2, COLUMNS), dtype=torch.float32, mix_dtype=None) -> list[Tensor | None]:
    """Return a, b and mix with gradients; LA's coefficients are one row for all tokens."""
    torch.manual_seed(0)
    leading = () if spec.learned_constant else shape[:-1]
    shapes = [shape, shape if spec.type_two else None]
    shapes += [(*leading, spec.num_coefficients) if spec.num_coefficients else None]
    dtypes = [dtype, dtype, mix_dtype or dtype]
    if spec.num_activation_parameters:
        shapes, dtypes = [*shapes, (spec.num_activation_parameters,)], [*dtypes, torch.float32]
    return [
        None if s is None else torch.randn(s).to(device, d).requires_grad_()
        for s, d in zip(shapes, dtypes, strict=True)
    ]


def formula(a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None = None, *, spec: FFNSpec) -> Tensor:
    rows = None if mix is None else mix.expand(*a.shape[:-1], -1)
    coefficients = Coefficients() if rows is None else mixing_coefficients(spec, rows)
    return reference.mixture(a, b, coefficients.matrix(a), spec.dictionaries, act)


def present(tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def detached(tensors) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def output_and_gradients(function, tensors, upstream) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, present(tensors), upstream.to(out))]


def fused(spec: FFNSpec):
    return lambda a, b, mix, act=None: kernels.mixture(a, b, mix, spec, act)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(spec: FFNSpec, tensors) -> None:
    """Compare output and gradients with float64, within the tolerance of each one's dtype."""
    upstream = torch.randn_like(tensors[0])
    actual = output_and_gradients(fused(spec), tensors, upstream)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = output_and_gradients(lambda *t: formula(*t, spec=spec), exact, upstream)
    assert actual[0].is_contiguous()
    for got, want, leaf in zip(actual, expected, [tensors[0], *present(tensors)], strict=True):
        assert (got.dtype, got.shape) == (leaf.dtype, want.shape)
        assert relative_rms(got, want) < TOLERANCES[leaf.dtype]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_variants_gates_and_dtypes(spec, dtype, device):
    check(spec, inputs(spec, device, dtype=dtype))


@pytest.mark.gpu
@needs_gpu[1]
@pytest.mark.parametrize("variant", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2100, 2048), (100, 2731)], ids=str)
def test_real_widths(variant, dtype, shape, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check(FFNSpec(variant), inputs(FFNSpec(variant), "cuda", shape, dtype))


PAIRS = [pair for name in KERNELS for pair in ((name, "tanh"), ("silu", name), (name, name))]


@pytest.mark.parametrize(("f", "g"), PAIRS)
def test_pairs_of_activations(f, g, device):
    spec = FFNSpec("qdmoa", gate_activations=(f,), up_activations=(g,))
    check(spec, inputs(spec, device, (2, 9)))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_coefficients_of_another_dtype(variant, dtypes, device):
    spec = FFNSpec(variant)
    check(spec, inputs(spec, device, dtype=dtypes[0], mix_dtype=dtypes[1]))


@pytest.mark.parametrize("variant", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, 1), (1, 70), (2, 3, 5)], ids=str)
def test_shapes(variant, shape, device):
    spec = FFNSpec(variant)
    check(spec, inputs(spec, device, shape))


@pytest.mark.parametrize("variant", ["qdmoa", "qdla"])
def test_no_tokens(variant, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device, (2, 0, 8))
    for result, leaf in zip(
        output_and_gradients(fused(spec), tensors, torch.zeros(2, 0, 8)), [tensors[0], *tensors], strict=True
    ):
        assert result.shape == leaf.shape and not result.any()


@pytest.mark.parametrize("name", KERNELS)
def test_activations_to_float32_rounding(name, device):
    spec, entry, one = FFNSpec("la", gate_activations=(name,)), ACTIVATIONS[name], torch.ones(1, device=device)
    act = torch.tensor(entry.parameters, device=device) if entry.parameters else None
    parameters = () if act is None else act.double()
    sizes = torch.tensor([*torch.logspace(-6, 1, 40), 0.499, 0.501, 0.624, 0.626, 12.0, 30.0, 1e3])
    a = torch.cat([sizes, -sizes, torch.zeros(1)]).to(device).requires_grad_()
    value = kernels.mixture(a, None, one, spec, act)
    (slope,) = torch.autograd.grad(value.sum(), a)
    exact = a.detach().double()
    assert_close(value.double(), entry.function(exact, *parameters), rtol=2e-6, atol=1e-6)
    assert entry.derivative is not None
    assert_close(slope.double(), entry.derivative(exact, *parameters), rtol=2e-6, atol=1e-6)
    small = a.detach().abs() < 0.1  # relative accuracy near 0
    assert_close(value[small].double(), entry.function(exact, *parameters)[small], rtol=2e-6, atol=0)
    assert kernels.mixture(torch.full((3,), math.nan, device=device), None, one, spec, act).isnan().all()


@pytest.mark.parametrize("gate", GATES)
def test_saturated_gates(gate, device):
    spec = FFNSpec("qdmoa", gate)
    a, b, mix = inputs(spec, device)
    mix = (200 * mix.detach()).requires_grad_()
    out, *gradients = output_and_gradients(fused(spec), (a, b, mix), torch.ones_like(a))
    assert relative_rms(out, formula(a.double(), b.double(), mix.double(), spec=spec)) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_deterministic_and_independent_of_other_rows(device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    upstream = torch.randn_like(tensors[0])
    first, second = (output_and_gradients(fused(spec), tensors, upstream) for _ in range(2))
    row = [t.detach()[1:2].clone().requires_grad_() for t in tensors]
    alone = output_and_gradients(fused(spec), row, upstream[1:2])
    for one, two, single in zip(first, second, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one[1:2], single)


def test_columns_split_among_programs(device, monkeypatch):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device, (3, 70))
    split = kernels.mixture(*tensors, spec)
    for name, value in (("FULL_GRID_ROWS", 1), ("FULL_GRID_ROWS", 100), ("MAX_SHARES", 2)):
        monkeypatch.setattr(build, name, value)
        assert torch.equal(kernels.mixture(*tensors, spec), split)


@pytest.mark.parametrize("variant", ["moa", "bimoa", "qdmoa"])
def test_slices_of_one_product_are_not_copied(variant, device, monkeypatch):
    spec = FFNSpec(variant)
    width = COLUMNS * (1 + spec.type_two)
    product = torch.randn(2, 3, width + spec.num_coefficients + 2, device=device)
    b = product[..., COLUMNS:width] if spec.type_two else None
    parts = [product[..., :COLUMNS], b, product[..., width : width + spec.num_coefficients]]
    seen, launch = [], build.forward
    monkeypatch.setattr(build, "forward", lambda m, operands: seen.append(operands) or launch(m, operands))
    kernels.mixture(*parts, spec)
    assert [seen[0][name].data_ptr() for name in seen[0] if name != "out"] == [t.data_ptr() for t in present(parts)]
    check(spec, [None if t is None else t.requires_grad_() for t in detached(parts)])


def test_strides(device):
    spec = FFNSpec("qdmoa")
    a, b, mix = detached(inputs(spec, device))
    strided = [a.t().contiguous().t(), b[:1].expand(2, -1), torch.stack([mix, mix], -1)[..., 1]]
    check(spec, [t.requires_grad_() for t in strided])
    out = kernels.mixture(*strided, spec)
    expanded = torch.autograd.grad(out.sum(), strided, retain_graph=True)
    dense = torch.autograd.grad(out, strided, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("variant", ["moa", "qdmoa"])
def test_rows_beyond_two_to_the_31_elements(variant, device):
    """Three rows, 2^30 + 64 elements apart; the memory between them is never touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("a GPU commits untouched memory too, and this one has less than 48 GiB")
    spec, distance = FFNSpec(variant), 2**30 + 64
    tensors = inputs(spec, device, (3, 9), torch.bfloat16)
    upstream = torch.randn(3, 9, device=device, dtype=torch.bfloat16)
    expected = output_and_gradients(fused(spec), tensors, upstream)

    def far_apart(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, (distance, 1), dtype=x.dtype, device=device).copy_(x.detach())

    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch everything
    try:
        far = {name: far_apart(t) for name, t in zip(("a", "b", "mix"), tensors, strict=True) if t is not None}
        results = {f"grad_{name}": far_apart(t) for name, t in far.items()} | {"out": far_apart(upstream)}
        build.forward(Mixture.of(spec), {**far, "out": results["out"]})
        assert torch.equal(results["out"], expected[0])
        build.backward(Mixture.of(spec), {"grad": far_apart(upstream), **far, **results})
        for name, gradient in zip(far, expected[1:], strict=True):
            assert torch.equal(results[f"grad_{name}"], gradient)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_packed_equals_unpacked(variant, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device, (6, 9))
    a, b, mix = detached(tensors)
    own = mix if spec.learned_constant else None
    inside = present([a, b, None if spec.learned_constant else mix])
    product = torch.cat([*inside, torch.full((6, 4), math.nan, device=device)], -1)
    upstream, key = torch.randn(6, 9, device=device), Mixture.of(spec).key
    out, *gradients = output_and_gradients(fused(spec), tensors, upstream)
    assert_close(operators.packed_mixture(product, own, None, 9, key), out)
    grad_product, grad_mix, _, again = operators.packed_mixture_backward(upstream, product, own, None, 9, True, key)
    assert_close(again, out)  # a GPU's compiler fuses multiplications and additions of the two kernels differently
    assert_close(grad_product[:, :-4], torch.cat(gradients[: len(inside)], -1))
    assert not grad_product[:, -4:].any()
    if own is not None:
        assert_close(grad_mix, gradients[-1])


@pytest.mark.parametrize("variant", ["la", "qdmoa"])
def test_saves_inputs_only(variant, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.mixture(*tensors, spec)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in present(tensors)}


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input(needed, device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    upstream = torch.randn_like(tensors[0])
    expected = output_and_gradients(fused(spec), tensors, upstream)[1 + needed]
    leaf = tensors[needed]
    frozen = [t if t is leaf else t.detach() for t in tensors]
    (gradient,) = torch.autograd.grad(kernels.mixture(*frozen, spec), leaf, upstream)
    assert torch.equal(gradient, expected)


def test_second_derivative_is_an_error(device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    (gradient, *_) = torch.autograd.grad(kernels.mixture(*tensors, spec).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*backend='eager'"):
        torch.autograd.grad(gradient.sum(), tensors)


def test_registered_activation(device, monkeypatch):
    for table in ("ACTIVATIONS", "_BY_ABBREVIATION"):
        monkeypatch.setattr(activations, table, dict(getattr(activations, table)))
    for module in ("backends.triton.source", "backends.reference", "spec"):
        monkeypatch.setattr(f"moa_ffn.{module}.ACTIVATIONS", activations.ACTIVATIONS)
    kernel = ("maximum(x, 0.0) + log(1.0 + exp(-abs(x)))", "sigmoid(x)")
    register_activation(Activation("softplus", "sp", F.softplus, torch.sigmoid, kernel=kernel))
    spec = FFNSpec("qdmoa", gate_activations=("softplus", "silu"), up_activations=("tanh", "softplus"))
    check(spec, inputs(spec, device))


# torch's check itself reads .grad of tensors that are not leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("variant", ["la", "qdmoa"])
def test_opcheck(variant, device):
    spec = FFNSpec(variant)
    tensors, key = inputs(spec, device, (2, 3)), Mixture.of(spec).key
    grad = torch.randn(2, 3, device=device)
    product = torch.randn(2, 3 * (1 + spec.type_two) + spec.num_coefficients + 1, device=device)
    mix = tensors[2].detach() if spec.learned_constant else None
    torch.library.opcheck(operators.mixture, (*tensors, None, key))
    for operator, arguments in (  # these have no derivatives
        (operators.mixture_backward, (grad, *detached(tensors), None, key)),
        (operators.packed_mixture, (product, mix, None, 3, key)),
        (operators.packed_mixture_backward, (grad, product, mix, None, 3, True, key)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Layer(torch.nn.Module):
    """qd-MoA on one matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = FFNSpec("qdmoa")
        self.up = torch.nn.Linear(4, 2 * 5 + self.spec.num_coefficients)
        self.down = torch.nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).split((5, 5, self.spec.num_coefficients), dim=-1)
        return self.down(kernels.mixture(*parts, self.spec))


@pytest.fixture
def layer(device) -> Layer:
    torch.manual_seed(0)
    return Layer().to(device)


def step(function, layer: Layer, x: Tensor) -> list[Tensor]:
    out = function(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), layer.parameters())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)


def test_compiles_without_graph_breaks(layer, device):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 2):
        x = torch.randn(tokens, 4, device=device)
        assert_same(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_as_one_operator(layer, device, strict):
    shapes = {"x": {0: torch.export.Dim("tokens", min=2)}}
    exported = torch.export.export(layer, (torch.randn(3, 4, device=device),), dynamic_shapes=shapes, strict=strict)
    assert "moa_ffn.mixture.default" in {str(node.target) for node in exported.graph.nodes}
    x = torch.randn(2, 4, device=device)
    assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(layer, device, reentrant):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert_same([out, *(p.grad for p in layer.parameters())], step(layer, layer, x))


@pytest.mark.gpu
@needs_gpu[1]
def test_cuda_graphs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, "cuda", (64, 512), torch.bfloat16)
    upstream = torch.randn_like(tensors[0])
    with torch.cuda.stream(torch.cuda.Stream()):  # compile the kernels before the capture
        output_and_gradients(fused(spec), tensors, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # detached, or the graph of autograd keeps nodes of the capturing stream, of which a later backward pass warns
        captured = [tensor.detach() for tensor in output_and_gradients(fused(spec), tensors, upstream)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for got, want in zip(captured, output_and_gradients(fused(spec), tensors, upstream), strict=True):
        assert torch.equal(got, want)
