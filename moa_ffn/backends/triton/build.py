"""Kernels from their source text, compiled or interpreted, and their launch.

Triton is imported here and in functions.py, when the first kernel is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import linecache
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_ffn.backends.triton import source
from moa_ffn.backends.triton.source import Mixture

WARP = 32
"""Threads of a warp."""


class Blocks(NamedTuple):
    """Size of a program's block.

    Attributes:
        vector_bytes: Bytes that one thread loads at once in the forward.
        forward_warps, backward_warps: The most warps of a program.
        backward_elements: Elements of a row per thread in the backward, where each element needs a dozen values and the
            sums of `SUMS`.
    """

    vector_bytes: int = 16
    forward_warps: int = 4
    backward_elements: int = 4
    backward_warps: int = 4


TUNED_BLOCKS = Path(__file__).with_name("blocks.json")
"""Measured blocks by name of the GPU, written by `python -m benchmarks tune --save`; other GPUs use the defaults."""

SUMS = 32
"""Running sums per thread (elements times coefficients); more would spill from its registers."""

FULL_GRID_ROWS = 2048
"""With fewer rows than this, the forward splits the columns of a row among programs to fill the GPU."""

MAX_SHARES = 65535
"""CUDA's limit of a grid's second dimension. Rows are the first, which allows 2^31 - 1."""


def interpreting() -> bool:
    """Return whether TRITON_INTERPRET selects Triton's interpreter, which runs kernels on any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def installed() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def tuned_blocks() -> dict[str, Blocks]:
    """Return the blocks of `TUNED_BLOCKS` by name of the GPU."""
    return {name: Blocks(**blocks) for name, blocks in json.loads(TUNED_BLOCKS.read_text(encoding="utf-8")).items()}


@cache
def device_name(device: torch.device) -> str:
    """Return the name of a GPU, "cpu" for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def forward(mixture: Mixture, operands: Mapping[str, Tensor]) -> None:
    """Launch the kernel of `source.forward` on tensors by operand name, `out` among them."""
    rows, columns = operands["a"].shape
    blocks = tuned_blocks().get(device_name(operands["a"].device), Blocks())
    elements = max(1, blocks.vector_bytes // operands["a"].element_size())
    block, warps = block_shape(columns, elements, blocks.forward_warps)
    shares = 1 if rows >= FULL_GRID_ROWS else min(-(-columns // block), MAX_SHARES)
    _launch(source.forward(mixture), (rows, shares), operands, block, warps)


def backward(mixture: Mixture, operands: Mapping[str, Tensor]) -> None:
    """Launch the kernel of `source.backward` on tensors by operand name; with `out`, it also writes the mixture."""
    rows, columns = operands["a"].shape
    blocks = tuned_blocks().get(device_name(operands["a"].device), Blocks())
    elements = min(blocks.backward_elements, max(1, SUMS // max(1, mixture.coefficients)))
    block, warps = block_shape(columns, elements, blocks.backward_warps)
    _launch(source.backward(mixture, with_output="out" in operands), (rows,), operands, block, warps)


def block_shape(columns: int, elements: int, max_warps: int) -> tuple[int, int]:
    """Return block length and warps of a program with up to `elements` per thread.

    Both are powers of two, as Triton requires, with no more warps than a row can use.
    """
    warp_block = WARP << (elements.bit_length() - 1)
    warps = 1
    while warps < max_warps and warps * warp_block < columns:
        warps *= 2
    return warps * warp_block, warps


def _launch(text: str, grid: tuple[int, ...], operands: Mapping[str, Tensor], block: int, warps: int) -> None:
    a = operands["a"]
    if 0 in grid:
        return
    pointers = {f"{name}_ptr": tensor for name, tensor in operands.items()}
    # coefficients shared by all tokens are one row, read by every program
    strides = {f"{name}_stride": tensor.stride(0) if tensor.ndim == 2 else 0 for name, tensor in operands.items()}
    settings = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}  # the default depends on Triton's version
    with torch.cuda.device_of(a):
        kernel(text, interpreting())[grid](**pointers, **strides, columns=a.shape[1], **settings)


@cache
def kernel(text: str, interpreted: bool) -> Any:
    """Return the kernel of this source text. `interpreted` is part of the cache key: Triton reads the environment."""
    import triton
    import triton.language as tl

    from moa_ffn.backends.triton import functions

    name = text.removeprefix("def ").partition("(")[0]
    file = f"<{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads source
    plain = (functions.add, functions.sigmoid, functions.tanh, functions.normal)
    helpers: dict[str, Any] = {f.__name__: f if interpreted else triton.jit(f) for f in plain}
    if interpreted:  # undecorated helpers and a known sum are faster there
        helpers["add"] = tl.standard._sum_combine
    namespace = {"__name__": __name__, "tl": tl, **helpers}
    exec(compile(text, file, "exec"), namespace)
    return triton.jit(namespace[name])
