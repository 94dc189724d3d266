"""Kernel source text, its compilation for a GPU on a machine without one, availability and argument checks."""

import subprocess
import sys

import pytest
import torch

from moa_ffn import ACTIVATIONS, Activation, FFNSpec
from moa_ffn.backends import triton as kernels
from moa_ffn.backends.triton import build, source
from moa_ffn.backends.triton.source import Mixture

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def test_import_does_not_import_triton():
    script = "import sys, moa_ffn.backends.triton as _; print({'triton', 'torch._dynamo'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_docstring_shows_generated_source():
    spec = FFNSpec("qdmoa", gate_activations=("silu", "relu"), up_activations=("identity", "tanh"))
    written = [line.strip() for line in source.forward(Mixture.of(spec)).splitlines()]
    shown = [line.strip() for line in source.__doc__.splitlines() if line.startswith("    ")]
    assert len(shown) == 7
    assert shown == [line for line in written if line in shown]


@pytest.mark.parametrize("variant", ["relu2", "swiglu", "moa", "onela", "bimoa", "qdmoa"])
def test_coefficients_are_numbered_as_in_the_layer(variant):
    spec, mixture = FFNSpec(variant), Mixture.of(FFNSpec(variant))
    pairs = [index for row in mixture.pair_coefficients for index in row]
    assert mixture.gate_coefficients + mixture.up_coefficients + pairs == list(range(spec.num_coefficients))
    assert Mixture.parse(mixture.key) == mixture


@pytest.mark.parametrize(
    ("columns", "elements", "expected"),
    [(1, 8, (256, 1)), (256, 8, (256, 1)), (257, 8, (512, 2)), (2048, 8, (1024, 4)), (2048, 5, (512, 4))],
)
def test_block_shape(columns, elements, expected):
    assert build.block_shape(columns, elements, 4) == expected


def test_blocks_are_those_of_the_device(monkeypatch):
    launched = []
    monkeypatch.setattr(build, "_launch", lambda text, grid, operands, *shape: launched.append(shape))
    mixture, operands = Mixture.of(FFNSpec("qdmoa")), {"a": torch.zeros(2, 4096), "out": torch.zeros(2, 4096)}
    for name in ("another GPU", "cpu"):
        tuned = {name: build.Blocks(vector_bytes=4, forward_warps=2, backward_elements=2, backward_warps=8)}
        monkeypatch.setattr(build, "tuned_blocks", lambda tuned=tuned: tuned)
        build.forward(mixture, operands)
        build.backward(mixture, operands)
    assert launched == [(512, 4), (512, 4), (64, 2), (512, 8)]


def compile_for_hopper(text: str, dtype: str, block: int, warps: int):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = build.kernel(text, False)
    names = kernel.arg_names
    signature = {name: POINTERS[dtype] if name.endswith("_ptr") else "i32" for name in names} | {"BLOCK": "constexpr"}
    code = ASTSource(kernel, signature, constexprs={(names.index("BLOCK"),): block})
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return compile(code, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("variant", "gate", "dtype"),
    [
        ("qdmoa", "sigmoid", "bf16"),
        ("bimoa", "softmax", "fp16"),
        ("moa", "tanh", "fp32"),
        ("swiglu", "sigmoid", "bf16"),
    ],
)
def test_kernels_compile_for_a_gpu(variant, gate, dtype, monkeypatch, tmp_path):
    if "nvidia" not in pytest.importorskip("triton.backends").backends:
        pytest.skip("this Triton has no NVIDIA compiler")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    mixture = Mixture.of(FFNSpec(variant, gate))
    for text in (source.forward(mixture), source.backward(mixture, with_output=True)):
        compiled = compile_for_hopper(text, dtype, *build.block_shape(2048, 4, 4))
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        offsets = [line for line in compiled.asm["ttir"].splitlines() if "arith.muli" in line and "_ptr" in line]
        assert offsets and all(": i64" in line for line in offsets)


def test_unavailable_reason(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec, x = FFNSpec("qdmoa"), torch.zeros(2, 3)
    assert "GPU" in str(kernels.unavailable_reason(x, spec))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unavailable_reason(x, spec) is None
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16, not torch\.float64"):
        kernels.mixture(x.double(), x.double(), torch.zeros(2, 6).double(), spec)
    monkeypatch.setattr(build, "installed", lambda: False)
    assert "not installed" in str(kernels.unavailable_reason(x, spec))


@pytest.mark.parametrize(("capability", "available"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_compute_capability(capability, available, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    reason = kernels._unavailable_reason("cuda", 0, torch.float32, "silu")
    assert (reason is None) == available and (available or "8.0" in str(reason))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (None, "'sine' has no kernel expressions"),
        (("sin(x)", "gamma(x)"), r"'sine'.*'gamma\(x\)' uses 'gamma', not x.*sigmoid"),
        (("tl.sin(x)", "cos(x)"), "'sine'.*uses 'tl.sin'"),
        (("sin(x", "cos(x)"), r"'sine'.*'sin\(x'"),
    ],
)
def test_wrong_kernel_expressions(kernel, message, monkeypatch):
    entry = Activation("sine", "sin", torch.sin, torch.cos, kernel=kernel)
    for module in ("moa_ffn.activations", "moa_ffn.backends.triton.source", "moa_ffn.spec"):
        monkeypatch.setattr(f"{module}.ACTIVATIONS", {**ACTIVATIONS, "sine": entry})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message):
        kernels.mixture(torch.zeros(2, 3), None, torch.zeros(2, 2), FFNSpec("moa", gate_activations=("silu", "sine")))


@pytest.mark.parametrize(
    ("variant", "changed", "message"),
    [
        ("qdmoa", {"b": None}, "b must be given for qdmoa"),
        ("moa", {"b": torch.zeros(2, 3)}, "b must be None for moa"),
        ("swiglu", {"mix": torch.zeros(2, 1)}, "mix must be None for swiglu"),
        ("qdmoa", {"b": torch.zeros(2, 4)}, r"b has shape \(2, 4\); it must be \(2, 3\)"),
        ("qdmoa", {"b": torch.zeros(2, 3).half()}, "b is torch.float16 on cpu; it must be torch.float32"),
        ("qdmoa", {"mix": torch.zeros(6)}, r"mix has shape \(6,\); it must be \(2, 6\)"),
        ("qdla", {"mix": torch.zeros(5)}, r"mix has shape \(5,\); it must be \(6,\)"),
        ("qdmoa", {"mix": torch.zeros(2, 6).double()}, "mix is torch.float64.*torch.bfloat16"),
    ],
)
def test_wrong_tensors(variant, changed, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec, shape = FFNSpec(variant), (2, 3)
    mix = torch.zeros(*(() if spec.learned_constant else (2,)), spec.num_coefficients)
    b = torch.zeros(shape) if spec.type_two else None
    tensors = {"a": torch.zeros(shape), "b": b, "mix": mix if spec.num_coefficients else None}
    with pytest.raises(ValueError, match=message):
        kernels.mixture(**{**tensors, **changed}, spec=spec)
