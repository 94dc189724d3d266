"""Mixture -> kernels, compiled or interpreted, and how they are launched.

Triton is imported here and in functions.py, when the first kernel is built.
"""

import hashlib
import importlib.util
import linecache
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moa_ffn.backends.triton import source
from moa_ffn.backends.triton.source import Mixture

WARP, MAX_WARPS = 32, 4

VECTOR_BYTES = 16
"""What one thread loads at once in the forward."""

BACKWARD_ELEMENTS = 4
"""Elements of a row that one thread holds in the backward, where each has a dozen values and the sums below."""

SUMS = 32
"""Running sums that one thread holds, its elements times the coefficients; more would not fit its registers."""

FULL_GRID_ROWS = 2048
"""With fewer rows than this, a GPU has idle processors unless the forward shares out the columns of a row."""

MAX_SHARES = 65535
"""Programs that a grid can have in its second dimension (CUDA); rows stand in the first, which takes 2^31 - 1."""


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter, on any device, as TRITON_INTERPRET in the environment asks."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def installed() -> bool:
    """True when Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def forward(mixture: Mixture, operands: Mapping[str, Tensor]) -> None:
    """Launch the kernel of `source.forward` on tensors by operand name, `out` among them."""
    rows, columns = operands["a"].shape
    block, warps = block_shape(columns, VECTOR_BYTES // operands["a"].element_size())
    shares = 1 if rows >= FULL_GRID_ROWS else min(-(-columns // block), MAX_SHARES)
    _launch(source.forward(mixture), (rows, shares), operands, block, warps)


def backward(mixture: Mixture, operands: Mapping[str, Tensor]) -> None:
    """Launch the kernel of `source.backward` on tensors by operand name; with `out`, it also writes the mixture."""
    rows, columns = operands["a"].shape
    elements = min(BACKWARD_ELEMENTS, max(1, SUMS // max(1, mixture.coefficients)))
    block, warps = block_shape(columns, elements)
    _launch(source.backward(mixture, with_output="out" in operands), (rows,), operands, block, warps)


def block_shape(columns: int, elements: int) -> tuple[int, int]:
    """Block length and warps of a program whose threads hold up to so many elements each: powers of two, as Triton
    wants them, and no more warps than a row has use for.
    """
    warp_block = WARP << (elements.bit_length() - 1)
    warps = 1
    while warps < MAX_WARPS and warps * warp_block < columns:
        warps *= 2
    return warps * warp_block, warps


def _launch(text: str, grid: tuple[int, ...], operands: Mapping[str, Tensor], block: int, warps: int) -> None:
    a = operands["a"]
    if 0 in grid:
        return
    pointers = {f"{name}_ptr": tensor for name, tensor in operands.items()}
    # coefficients that all tokens share are one row, read by every program
    strides = {f"{name}_stride": tensor.stride(0) if tensor.ndim == 2 else 0 for name, tensor in operands.items()}
    # Products and sums fuse, whatever the default of Triton's version is.
    settings = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(a):
        kernel(text, interpreting())[grid](**pointers, **strides, columns=a.shape[1], **settings)


@cache
def kernel(text: str, interpreted: bool) -> Any:
    """The kernel of this text. `interpreted` is what Triton reads from the environment itself: a key of the cache."""
    import triton
    import triton.language as tl

    from moa_ffn.backends.triton import functions

    name = text.removeprefix("def ").partition("(")[0]
    file = f"<{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton looks for source
    plain = (functions.add, functions.sigmoid, functions.tanh, functions.normal)
    helpers: dict[str, Any] = {f.__name__: f if interpreted else triton.jit(f) for f in plain}
    if interpreted:  # plain functions will do there, and are quicker; so is a sum that it knows
        helpers["add"] = tl.standard._sum_combine
    namespace = {"__name__": __name__, "tl": tl, **helpers}
    exec(compile(text, file, "exec"), namespace)
    return triton.jit(namespace[name])
