"""Kernel source text, and its compilation by Triton for a GPU on a machine without one."""

import subprocess
import sys

import pytest

from moa_ffn import FFNSpec
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
    assert build.block_shape(columns, elements) == expected


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
        compiled = compile_for_hopper(text, dtype, *build.block_shape(2048, 4))
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        offsets = [line for line in compiled.asm["ttir"].splitlines() if "arith.muli" in line and "_ptr" in line]
        assert offsets and all(": i64" in line for line in offsets)
