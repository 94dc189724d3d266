"""The layer under torch's tools: tracers, exporters, torch.func, dispatch modes and fake tensors."""

import io

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import FFN, VARIANTS
from moa_ffn.backends import compiled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:The TorchScript type system:UserWarning",  # of every torch.fx.GraphModule
    "ignore:The given buffer is not writable:UserWarning",  # torch.export.load of torch 2.11
)

DIM, HIDDEN = 8, 16
MIXTURES = [
    *((variant, {}) for variant in VARIANTS),
    ("bimoa", {"mixing_gate": "softmax"}),
    ("onemoa", {"mixed_branch": "up", "mix_bias": True}),
    ("moa", {"gate_activations": "g,s,r,r2,l,t,id"}),
    ("bimoa", {"mix_base": "anchor"}),
    ("qdmoa", {"mix_pool": True}),
]


def make(variant: str = "qdmoa", **settings) -> FFN:
    torch.manual_seed(0)
    return FFN(DIM, HIDDEN, variant, **{"bias": True, "mix_init_std": 0.5, **settings}).double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def script(ffn: FFN, x: Tensor):
    return torch.jit.script(ffn)


def trace(ffn: FFN, x: Tensor):
    return torch.jit.trace(ffn, x)


def export(ffn: FFN, x: Tensor, strict: bool = False):
    return torch.export.export(ffn, (x,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=strict)


def saved(program):
    """Return `program` after saving and loading."""
    file = io.BytesIO()
    if isinstance(program, torch.jit.ScriptModule):
        torch.jit.save(program, file)
    else:
        torch.export.save(program, file)
    file.seek(0)
    return torch.jit.load(file) if isinstance(program, torch.jit.ScriptModule) else torch.export.load(file).module()


@pytest.mark.parametrize("how", [script, trace, export], ids=lambda how: how.__name__)
@pytest.mark.parametrize(("variant", "settings"), MIXTURES, ids=str)
def test_saved_graphs_accept_any_batch_size(variant, settings, how):
    ffn = make(variant, **settings)
    program = saved(how(ffn, tokens(3, 5)))
    for shape in ((3, 5), (7, 5), (1, 5)):
        torch.testing.assert_close(program(tokens(*shape)), ffn(tokens(*shape)))


def test_exported_graph_has_torch_operators_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    targets = {str(node.target) for node in export(make().float(), tokens(3, 5).float(), strict=True).graph.nodes}
    assert not [name for name in targets if "moa" in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_per_sample_gradients(variant):
    ffn, x = make(variant), tokens(4, 5)

    def loss(parameters, sample):
        return functional_call(ffn, parameters, (sample,)).square().mean()

    parameters = dict(ffn.named_parameters())
    gradients = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(ffn(sample).square().mean(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name][index], gradient)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("variant", ["gelu", "moa", "bila", "qdmoa"])
def test_jacobians_and_hessians(variant, backend):
    ffn, x = make(variant, backend=backend), tokens(2)
    expected = torch.autograd.functional.jacobian(ffn, x)
    for jacobian in (jacrev(ffn)(x), jacfwd(ffn)(x), torch.autograd.functional.jacobian(ffn, x, vectorize=True)):
        torch.testing.assert_close(jacobian, expected)

    def total(x):
        return ffn(x).sin().sum()

    torch.testing.assert_close(hessian(total)(x), torch.autograd.functional.hessian(total, x))


def test_forward_mode():
    ffn, x, direction = make(), tokens(3), tokens(2, 3)[1]
    out, tangent, *_ = jvp(ffn, (x,), (direction,))
    torch.testing.assert_close(out, ffn(x))
    jacobian = torch.autograd.functional.jacobian(ffn, x)
    torch.testing.assert_close(tangent, torch.einsum("abcd,cd->ab", jacobian, direction))


class Logging(TorchFunctionMode):
    """A function mode that compilers cannot trace."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        print(func, file=io.StringIO())
        return func(*args, **(kwargs or {}))


def step(ffn: FFN, x: Tensor) -> Tensor:
    out = ffn(x)
    out.sum().backward()
    ffn.zero_grad()
    return out


def count_flops(ffn: FFN, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        out = step(ffn, x)
    assert counter.get_total_flops() == 2 * len(x) * DIM * HIDDEN * (3 + 3 + 1)  # forward, weights, hidden
    return out


def track_memory(ffn: FFN, x: Tensor) -> Tensor:
    with MemTracker():
        return step(ffn, x)


def function_mode(ffn: FFN, x: Tensor) -> Tensor:
    with Logging():
        return step(ffn, x)


def fake(ffn: FFN, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = step(ffn, mode.from_tensor(x))
    assert isinstance(out, FakeTensor)
    ffn.zero_grad()
    return torch.zeros(0)


def make_graph(ffn: FFN, x: Tensor) -> Tensor:
    parameters = dict(ffn.named_parameters())
    graph = make_fx(lambda p, x: functional_call(ffn, p, (x,)), tracing_mode="symbolic")(parameters, x)
    torch.testing.assert_close(graph(parameters, x[:3]), ffn(x[:3]), rtol=1e-4, atol=1e-5)
    return graph(parameters, x)


def backward_in_a_mode(ffn: FFN, x: Tensor) -> Tensor:
    out = ffn(x)
    with FlopCounterMode(display=False):
        out.sum().backward()
    ffn.zero_grad()
    return out


def batched_gradients(ffn: FFN, x: Tensor) -> Tensor:
    leaf = x.requires_grad_()
    directions = torch.randn(2, *x.shape)
    (together,) = torch.autograd.grad(ffn(leaf), leaf, directions, is_grads_batched=True)
    (alone,) = torch.autograd.grad(ffn(leaf), leaf, directions[1])
    torch.testing.assert_close(together[1], alone, rtol=1e-4, atol=1e-5)
    return ffn(x)


@pytest.mark.parametrize(
    "tool",
    [count_flops, track_memory, function_mode, fake, make_graph, backward_in_a_mode, batched_gradients],
    ids=lambda tool: tool.__name__,
)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_modes_see_plain_operations(tool, warm, monkeypatch):
    """A first call in a mode must not disable compilation; a later one must not enter a compiled region."""
    monkeypatch.delenv(compiled.SWITCH)
    compiled._tried.cache_clear()
    if (reason := compiled.unavailable_reason()) is not None:
        pytest.skip(reason)
    if not warm:
        compiled._tried.cache_clear()
    monkeypatch.setattr(compiled, "MIN_ELEMENTS", 1)
    ffn, x = make("swiglu").float(), tokens(64).float()
    expected = step(ffn, x) if warm else None
    out = tool(ffn, x)
    if len(out):
        torch.testing.assert_close(out, ffn(x) if expected is None else expected, rtol=1e-4, atol=1e-5)
    assert compiled.unavailable_reason() is None
    assert ffn.choose_backend(x) == "cpu"


def test_tracing_a_named_backend_is_an_error():
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run: .*torch\.fx, torch\.jit, torch\.func"):
        torch.fx.symbolic_trace(make(backend="cpu"))
