"""The fused kernels against the formula in float64: in Triton's interpreter, and with `-m gpu` on a GPU."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ffn import ACTIVATIONS, GATES, VARIANTS, Activation, FFNSpec, activations, register_activation
from moa_ffn.backends import triton as kernels
from moa_ffn.backends.reference import gate_function, mixture
from moa_ffn.backends.triton import build, operators
from moa_ffn.backends.triton.source import Mixture

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
COLUMNS = 37
"""Odd, and more than one block in the interpreter."""

without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
VARIANTS_AND_GATES = [
    (variant, gate) for variant in VARIANTS for gate in (GATES if FFNSpec(variant).token_adaptive else GATES[:1])
]
ONE_OF_EACH = ["relu2", "swiglu", "moa", "onela", "bimoa", "qdla", "qdmoa"]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=[pytest.mark.gpu, without_gpu])])
def device(request, monkeypatch):
    """Where tensors lie; kernels run in the interpreter for "cpu". Fresh memory holds NaN throughout."""
    pytest.importorskip(
        "triton"
    )  # imported before the variable is set, so that Triton's own functions stay as they are
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(build, "WARP", 4)  # blocks of 16 to 64 columns
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS warns of the next setting
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield "cpu" if request.param == "interpreter" else "cuda"
    torch.use_deterministic_algorithms(before)


def inputs(spec: FFNSpec, device, shape=(2, COLUMNS), dtype=torch.float32, mix_dtype=None) -> list[Tensor | None]:
    """a, b and mix with gradients; LA's coefficients are one row for all tokens."""
    torch.manual_seed(0)
    leading = () if spec.learned_constant else shape[:-1]
    shapes = [shape, shape if spec.type_two else None]
    shapes += [(*leading, spec.num_coefficients) if spec.num_coefficients else None]
    dtypes = (dtype, dtype, mix_dtype or dtype)
    return [
        None if s is None else torch.randn(s).to(device, d).requires_grad_()
        for s, d in zip(shapes, dtypes, strict=True)
    ]


def written_out(a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec) -> Tensor:
    k1, k2 = len(spec.gate_dictionary), max(1, len(spec.up_dictionary))
    one = a.new_ones(*a.shape[:-1], 1)
    logits = [one, one]
    if mix is not None:
        flat = mix.expand(*a.shape[:-1], -1)
        parts = {"gate": (k1, 0), "up": (0, k2), "separable": (k1, k2), "full": (k1 * k2, 0)}[spec.form]
        gate = (lambda x: gate_function(x, spec.mixing_gate)) if spec.token_adaptive else (lambda x: x)
        logits = [gate(x) if x.shape[-1] else one for x in flat.split(parts, dim=-1)]
    if spec.form == "full":
        coefficients = logits[0].unflatten(-1, (k1, k2))
    else:
        coefficients = logits[0].unsqueeze(-1) * logits[1].unsqueeze(-2)
    return mixture(a, b, coefficients, spec.gate_dictionary, spec.up_dictionary)


def present(tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def value_and_gradients(function, tensors, upstream) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, present(tensors), upstream.to(out))]


def fused(spec: FFNSpec):
    return lambda a, b, mix: kernels.mixture(a, b, mix, spec)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return ((actual.double() - expected).square().mean().sqrt() / scale).item()


def check(spec: FFNSpec, tensors, tolerances) -> None:
    """Output and every gradient against float64; one tolerance, or one for each in order."""
    upstream = torch.randn_like(tensors[0])
    actual = value_and_gradients(fused(spec), tensors, upstream)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = value_and_gradients(lambda *t: written_out(*t, spec), exact, upstream)
    assert actual[0].dtype == tensors[0].dtype
    assert actual[0].is_contiguous()
    for got, want, leaf in zip(actual, expected, [tensors[0], *present(tensors)], strict=True):
        assert got.dtype == leaf.dtype
        assert got.shape == want.shape
        assert relative_rms(got, want) < tolerances[leaf.dtype]


@pytest.mark.parametrize(("variant", "gate"), VARIANTS_AND_GATES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_variant_gate_and_dtype(variant, gate, dtype, device):
    spec = FFNSpec(variant, gate)
    check(spec, inputs(spec, device, dtype=dtype), TOLERANCES)


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("variant", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2100, 2048), (100, 2731)], ids=str)
def test_real_widths(variant, dtype, shape, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check(FFNSpec(variant), inputs(FFNSpec(variant), "cuda", shape, dtype), TOLERANCES)


@pytest.mark.parametrize("variant", ["onemoa", "onela"])
def test_mixing_the_up_branch(variant, device):
    spec = FFNSpec(variant, mixed_branch="up")
    check(spec, inputs(spec, device), TOLERANCES)


@pytest.mark.parametrize(("f", "g"), list(itertools.product(ACTIVATIONS, ACTIVATIONS)))
def test_every_pair_of_activations(f, g, device):
    spec = FFNSpec("qdmoa", gate_activations=(f,), up_activations=(g,))
    check(spec, inputs(spec, device, (2, 9)), TOLERANCES)


@pytest.mark.parametrize("variant", ["moa", "bimoa", "qdmoa"])
def test_all_activations_at_once(variant, device):
    names = tuple(ACTIVATIONS)
    spec = FFNSpec(variant, gate_activations=names, up_activations=names)
    check(spec, inputs(spec, device, (2, 9)), TOLERANCES)


@pytest.mark.parametrize(
    ("dtype", "mix_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str
)
@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_coefficients_in_a_dtype_of_their_own(variant, dtype, mix_dtype, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device, dtype=dtype, mix_dtype=mix_dtype)
    # the coefficients' gradient is rounded once, to their dtype, so it is as exact as that
    check(spec, tensors, TOLERANCES)


@pytest.mark.parametrize("variant", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, 1), (1, 70), (2, 3, 5), (0, 8), (2, 0, 8)], ids=str)
def test_shapes(variant, shape, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device, shape)
    if 0 not in shape:
        return check(spec, tensors, TOLERANCES)
    out, *gradients = value_and_gradients(fused(spec), tensors, torch.zeros(shape))
    assert out.shape == shape
    for gradient, leaf in zip(gradients, present(tensors), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()  # LA's coefficients have one, of no tokens


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_to_float32_rounding(name, device):
    spec = FFNSpec("la", gate_activations=(name,))
    sizes = torch.tensor([*torch.logspace(-6, 1, 40), 0.624, 0.626, 12.0, 30.0, 1e3])
    a = torch.cat([sizes, -sizes, torch.zeros(1)]).to(device).requires_grad_()
    value = kernels.mixture(a, None, torch.ones(1, device=device), spec)
    (slope,) = torch.autograd.grad(value.sum(), a)
    exact = a.detach().double()
    entry = ACTIVATIONS[name]
    torch.testing.assert_close(value.double(), entry.function(exact), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), entry.derivative(exact), rtol=2e-6, atol=1e-6)
    near = a.detach().abs() < 0.1  # as exact near zero, relative to the value itself
    torch.testing.assert_close(value[near].double(), entry.function(exact)[near], rtol=2e-6, atol=0)
    undefined = torch.full((3,), math.nan, device=device)
    assert kernels.mixture(undefined, None, torch.ones(1, device=device), spec).isnan().all()


@pytest.mark.parametrize("gate", GATES)
def test_saturated_gates(gate, device):
    spec = FFNSpec("qdmoa", gate)
    a, b, mix = inputs(spec, device)
    mix = (200 * mix.detach()).requires_grad_()
    out, *gradients = value_and_gradients(fused(spec), (a, b, mix), torch.ones_like(a))
    exact = written_out(a.double(), b.double(), mix.double(), spec)
    assert relative_rms(out, exact) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_runs_are_equal_and_rows_independent(device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    upstream = torch.randn_like(tensors[0])
    kept = [t.detach().clone() for t in tensors]
    first, second = (value_and_gradients(fused(spec), tensors, upstream) for _ in range(2))
    row = [t.detach()[1:2].clone().requires_grad_() for t in tensors]
    alone = value_and_gradients(fused(spec), row, upstream[1:2])
    for one, two, single in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[1:2], single)
    assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))


def test_columns_may_be_shared_out(device, monkeypatch):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device, (3, 70))
    shared = kernels.mixture(*tensors, spec)
    monkeypatch.setattr(build, "FULL_GRID_ROWS", 1)
    assert torch.equal(kernels.mixture(*tensors, spec), shared)
    monkeypatch.setattr(build, "FULL_GRID_ROWS", 100)
    monkeypatch.setattr(build, "MAX_SHARES", 2)
    assert torch.equal(kernels.mixture(*tensors, spec), shared)


@pytest.mark.parametrize("variant", [v for v in ONE_OF_EACH if FFNSpec(v).token_adaptive])
def test_parts_of_one_product_are_not_copied(variant, device, monkeypatch):
    spec = FFNSpec(variant)
    width = COLUMNS * (1 + spec.type_two)
    product = torch.randn(2, 3, width + spec.num_coefficients + 2, device=device)
    a, mix = product[..., :COLUMNS], product[..., width : width + spec.num_coefficients]
    parts = [a, product[..., COLUMNS:width] if spec.type_two else None, mix]
    seen = []
    launch = build.forward
    monkeypatch.setattr(build, "forward", lambda m, operands: seen.append(operands) or launch(m, operands))
    out = kernels.mixture(*parts, spec)
    assert [seen[0][name].data_ptr() for name in seen[0] if name != "out"] == [t.data_ptr() for t in present(parts)]
    contiguous = [None if t is None else t.contiguous() for t in parts]
    assert torch.equal(out, kernels.mixture(*contiguous, spec))
    leaves = [None if t is None else t.detach().requires_grad_() for t in parts]
    check(spec, leaves, TOLERANCES)


def test_any_strides(device):
    spec = FFNSpec("qdmoa")
    a, b, mix = inputs(spec, device)
    strided = [
        a.detach().t().contiguous().t(),  # neighbours in a row far apart
        b.detach()[:1].expand(2, -1),  # the same row twice
        torch.stack([mix.detach()] * 2, -1)[..., 1],
    ]
    check(spec, [t.requires_grad_() for t in strided], TOLERANCES)
    out = kernels.mixture(a, b, mix, spec)
    from_expanded = torch.autograd.grad(out.sum(), (a, b, mix), retain_graph=True)
    from_dense = torch.autograd.grad(out, (a, b, mix), torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(from_expanded, from_dense, strict=True))


@pytest.mark.parametrize("variant", ["moa", "qdmoa"])
def test_rows_beyond_two_to_the_31_elements(variant, device):
    """Three rows, 2^30 + 64 elements apart, in memory of which nothing else is ever touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("a GPU gives memory that is not touched, too, and this one has less than 48 GiB")
    spec, distance = FFNSpec(variant), 2**30 + 64
    tensors = inputs(spec, device, (3, 9), torch.bfloat16)
    upstream = torch.randn(3, 9, device=device, dtype=torch.bfloat16)
    expected = value_and_gradients(fused(spec), tensors, upstream)

    def far_apart(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, (distance, 1), dtype=x.dtype, device=device).copy_(x.detach())

    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch it all
    try:
        wanted = Mixture.of(spec)
        far = {name: far_apart(t) for name, t in zip(("a", "b", "mix"), tensors, strict=True) if t is not None}
        results = {name: far_apart(upstream) for name in ("out", *(f"grad_{n}" for n in far))}
        results["grad_mix"] = far_apart(far["mix"])
        build.forward(wanted, {**far, "out": results["out"]})
        assert torch.equal(results["out"], expected[0])
        build.backward(wanted, {"grad": far_apart(upstream), **far, **results})
        for name, gradient in zip(far, expected[1:], strict=True):
            assert torch.equal(results[f"grad_{name}"], gradient)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_backward_with_the_mixture(variant, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device, (2, 3, 9))
    upstream = torch.randn(2, 3, 9, device=device)
    out, *expected = value_and_gradients(fused(spec), tensors, upstream)
    detached = [None if t is None else t.detach() for t in tensors]
    found = kernels.mixture_backward(upstream, *detached, spec, with_output=True)
    assert [field is None for field in found] == [*(t is None for t in tensors), False]
    assert all(torch.equal(x, y) for x, y in zip(present(found), [*expected, out], strict=True))
    assert kernels.mixture_backward(upstream, *detached, spec).output is None


@pytest.mark.parametrize("variant", ONE_OF_EACH)
@pytest.mark.parametrize("own_mix", [False, True])
def test_packed(variant, own_mix, device):
    spec = FFNSpec(variant)
    a, b, mix = (None if t is None else t.detach() for t in inputs(spec, device, (2, 3, 9)))
    own = mix if own_mix or spec.learned_constant else None
    inside = present([a, b, None if own is not None else mix])
    used = sum(t.shape[-1] for t in inside)
    product = torch.cat([*inside, torch.full((2, 3, 4), math.nan, device=device)], -1).requires_grad_()
    leaves = [product, *([] if own is None else [own.requires_grad_()])]
    upstream = torch.randn(2, 3, 9, device=device)
    out = kernels.packed_mixture(product, own, 9, spec)
    gradients = torch.autograd.grad(out, leaves, upstream)
    expected = kernels.mixture_backward(upstream, a, b, mix, spec, with_output=True)
    assert torch.equal(out, expected.output)
    parts = present([expected.a, expected.b, expected.mix if own is None else None])
    assert torch.equal(gradients[0][..., :used], torch.cat(parts, -1))
    assert not gradients[0][..., used:].any()  # the padding has none, whatever it holds
    found = kernels.packed_mixture_backward(upstream, product.detach(), own, 9, spec, with_output=True)
    assert torch.equal(found.projected, gradients[0])
    assert torch.equal(found.output, out)
    if own is None:
        assert found.mix is None
    else:
        assert torch.equal(found.mix, gradients[1])
        assert torch.equal(found.mix, expected.mix)


@pytest.mark.parametrize("variant", ["la", "qdmoa"])
def test_saves_its_inputs_alone(variant, device):
    spec = FFNSpec(variant)
    tensors = inputs(spec, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.mixture(*tensors, spec)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in present(tensors)}


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradients_of_some_inputs(needed, device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    upstream = torch.randn_like(tensors[0])
    expected = value_and_gradients(fused(spec), tensors, upstream)[1 + needed]
    leaf = tensors[needed]
    frozen = [t if t is leaf else t.detach() for t in tensors]
    (gradient,) = torch.autograd.grad(kernels.mixture(*frozen, spec), leaf, upstream)
    assert torch.equal(gradient, expected)


def test_second_derivatives_are_refused(device):
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, device)
    (gradient, *_) = torch.autograd.grad(kernels.mixture(*tensors, spec).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*backend='eager'"):
        torch.autograd.grad(gradient.sum(), tensors)


def test_an_activation_of_the_users_own(device, monkeypatch):
    for table in ("ACTIVATIONS", "_BY_ABBREVIATION"):
        monkeypatch.setattr(activations, table, dict(getattr(activations, table)))
    for module in (kernels.source, __import__("sys").modules["moa_ffn.backends.reference"]):
        monkeypatch.setattr(module, "ACTIVATIONS", activations.ACTIVATIONS)
    monkeypatch.setattr("moa_ffn.spec.ACTIVATIONS", activations.ACTIVATIONS)
    register_activation(
        Activation(
            "softplus",
            "sp",
            F.softplus,
            torch.sigmoid,
            kernel=("maximum(x, 0.0) + log(1.0 + exp(-abs(x)))", "sigmoid(x)"),
        )
    )
    spec = FFNSpec("qdmoa", gate_activations=("softplus", "silu"), up_activations=("tanh", "softplus"))
    check(spec, inputs(spec, device), TOLERANCES)


# ---- inside torch


# torch's check reads .grad of tensors that are no leaves, and warns of it itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("variant", ["la", "qdmoa"])
def test_operators_pass_torchs_checks(variant, device):
    spec = FFNSpec(variant)
    wanted, tensors = Mixture.of(spec), inputs(spec, device, (2, 3))
    grad = torch.randn(2, 3, device=device)
    product = torch.randn(2, 3 * (1 + spec.type_two) + spec.num_coefficients + 1, device=device, requires_grad=True)
    mix = tensors[2] if spec.learned_constant else None
    backward = (grad, *(None if t is None else t.detach() for t in tensors), True, *wanted)
    packed_backward = (grad, product.detach(), None if mix is None else mix.detach(), 3, True, *wanted)
    torch.library.opcheck(operators.mixture, (*tensors, *wanted))
    torch.library.opcheck(operators.packed_mixture, (product, mix, 3, *wanted))
    for operator, arguments in (
        (operators.mixture_backward, backward),
        (operators.packed_mixture_backward, packed_backward),
    ):  # they have no derivatives to be checked
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Layer(torch.nn.Module):
    """qd-MoA on one matrix product, asking for obstacles as a layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = FFNSpec("qdmoa")
        self.up = torch.nn.Linear(4, 2 * 5 + self.spec.num_coefficients)
        self.down = torch.nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        product = self.up(x)
        if (reason := kernels.unavailable_reason(product, self.spec)) is not None:
            raise ValueError(reason)
        parts = product.split((5, 5, self.spec.num_coefficients), dim=-1)
        return self.down(kernels.mixture(*parts, self.spec) + kernels.packed_mixture(product, None, 5, self.spec))


@pytest.fixture
def layer(device) -> Layer:
    torch.manual_seed(0)
    return Layer().to(device)


def step(function, layer: Layer, x: Tensor) -> list[Tensor]:
    out = function(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), layer.parameters())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_whole(layer, device):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 2):
        x = torch.randn(tokens, 4, device=device)
        assert_same(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_whole(layer, device, strict):
    x = torch.randn(3, 4, device=device)
    exported = torch.export.export(
        layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}}, strict=strict
    )
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"moa_ffn.mixture.default", "moa_ffn.packed_mixture.default"} <= names
    for tokens in (3, 2):
        x = torch.randn(tokens, 4, device=device)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(layer, device, reentrant):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint
    expected = step(layer, layer, x)
    if reentrant:  # that kind knows .backward() alone
        again(layer, x, use_reentrant=True).square().sum().backward()
        return assert_same([p.grad for p in layer.parameters()], expected[1:])
    assert_same(step(lambda x: again(layer, x, use_reentrant=False), layer, x), expected)


def test_autocast(layer, device):
    x = torch.randn(3, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        out, *gradients = step(layer, layer, x)
    assert out.dtype == torch.bfloat16
    for got, want in zip([out, *gradients], step(layer, layer, x), strict=True):
        assert relative_rms(got, want.double()) < 3e-2  # three products in bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_data_parallel(layer, device, how, tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    x = torch.randn(3, 4, device=device)
    _, *expected = step(layer, layer, x)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if how == "ddp":
            model = DistributedDataParallel(layer)
        else:
            mesh = torch.distributed.device_mesh.init_device_mesh(device, (1,))
            model = fully_shard(layer, mesh=mesh)
        model(x).square().sum().backward()
        found = [p.grad.full_tensor() if how == "fsdp" else p.grad for p in layer.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    assert_same(found, expected)


@pytest.mark.gpu
@without_gpu
def test_cuda_graphs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = FFNSpec("qdmoa")
    tensors = inputs(spec, "cuda", (64, 512), torch.bfloat16)
    upstream = torch.randn_like(tensors[0])
    with torch.cuda.stream(torch.cuda.Stream()):  # kernels are compiled before the capture
        value_and_gradients(fused(spec), tensors, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(fused(spec), tensors, upstream)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for got, want in zip(captured, value_and_gradients(fused(spec), tensors, upstream), strict=True):
        assert torch.equal(got, want)


# ---- what cannot be


def test_obstacles(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec, x = FFNSpec("qdmoa"), torch.zeros(2, 3)
    assert "GPU" in str(kernels.unavailable_reason(x, spec))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unavailable_reason(x, spec) is None
    assert "not torch.float64" in str(kernels.unavailable_reason(x.double(), spec))
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16, not torch\.float64"):
        kernels.mixture(x.double(), x.double(), torch.zeros(2, 6).double(), spec)
    monkeypatch.setattr(build, "installed", lambda: False)
    assert "not installed" in str(kernels.unavailable_reason(x, spec))


def test_old_gpus_are_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for capability, named in [((7, 5), True), ((8, 0), False), ((12, 0), False)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ("8.0" in str(kernels._unavailable_reason("cuda", 0, torch.float32, "silu"))) == named


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (None, "'sine' has no kernel expressions"),
        (("sin(x)", "gamma(x)"), r"'sine'.*'gamma\(x\)' uses 'gamma', not x.*sigmoid"),
        (("tl.sin(x)", "cos(x)"), "'sine'.*uses 'tl.sin'"),
        (("sin(x", "cos(x)"), r"'sine'.*'sin\(x'"),
    ],
)
def test_activations_without_kernels_are_named(kernel, message, monkeypatch):
    entry = Activation("sine", "sin", torch.sin, torch.cos, kernel=kernel)
    for module in ("moa_ffn.activations", "moa_ffn.backends.triton.source", "moa_ffn.spec"):
        monkeypatch.setattr(f"{module}.ACTIVATIONS", {**ACTIVATIONS, "sine": entry})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = FFNSpec("moa", gate_activations=("silu", "sine"))
    with pytest.raises(ValueError, match=message):
        kernels.mixture(torch.zeros(2, 3), None, torch.zeros(2, 2), spec)


@pytest.mark.parametrize(
    ("variant", "changed", "message"),
    [
        ("qdmoa", {"b": None}, "b must be given for qdmoa"),
        ("moa", {"b": torch.zeros(2, 3)}, "b must be None for moa"),
        ("qdmoa", {"mix": None}, "mix must be given for qdmoa"),
        ("swiglu", {"mix": torch.zeros(2, 1)}, "mix must be None for swiglu"),
        ("qdmoa", {"b": torch.zeros(2, 4)}, r"b has shape \(2, 4\); it must be \(2, 3\)"),
        ("qdmoa", {"b": torch.zeros(2, 3).half()}, "b is torch.float16 on cpu; it must be torch.float32"),
        ("qdmoa", {"mix": torch.zeros(6)}, r"mix has shape \(6,\); it must be \(2, 6\)"),
        ("qdla", {"mix": torch.zeros(5)}, r"mix has shape \(5,\); it must be \(6,\)"),
        ("qdmoa", {"mix": torch.zeros(2, 6).double()}, "mix is torch.float64.*torch.bfloat16"),
    ],
)
def test_tensors_that_do_not_fit(variant, changed, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = FFNSpec(variant)
    a, b, mix = inputs(spec, "cpu", (2, 3))
    tensors = {"a": a, "b": b, "mix": mix, **changed}
    with pytest.raises(ValueError, match=message):
        kernels.mixture(**tensors, spec=spec)


@pytest.mark.parametrize(
    ("variant", "columns", "mix", "message"),
    [
        ("qdmoa", 5, None, "hidden_dim=5: qdmoa needs 16 columns, and projected has 15"),
        ("qdla", 5, None, "mix must be given for qdla"),
        ("swiglu", 5, torch.zeros(2, 1), "mix must be None for swiglu"),
    ],
)
def test_products_that_do_not_fit(variant, columns, mix, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message):
        kernels.packed_mixture(torch.zeros(2, 15), mix, columns, FFNSpec(variant))
    with pytest.raises(ValueError, match="grad has shape"):
        kernels.packed_mixture_backward(torch.zeros(2, 4), torch.zeros(2, 16), None, 5, FFNSpec("qdmoa"))
