"""Block shapes and warps of the GPU kernels: time of each choice over that of the one in build.py.

The forward loads `VECTOR_BYTES` a thread, the backward computes `BACKWARD_ELEMENTS` elements a thread, and a program
has at most `MAX_WARPS` warps. The fastest choice of a table is the value for the constant of that name.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.ffn import hidden_width, inference, mixture_function, operands
from benchmarks.options import add_number, add_variants, on_gpu
from benchmarks.tables import rate, report, time_ratio, times
from benchmarks.timing import Case, device_seconds, measure
from moa_ffn import FFNSpec
from moa_ffn.backends.triton import build

CHOICES = {"forward": ("VECTOR_BYTES", (4, 8, 16, 32)), "backward": ("BACKWARD_ELEMENTS", (1, 2, 4, 8))}
WARPS = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, ("swiglu", "moa", "qdmoa"))
    add_number(parser, "--tokens", on_gpu(64, 12800), "tokens")
    add_number(parser, "--dim", 768, "model width")


def run(args: argparse.Namespace) -> None:
    """Measure and report. On a CPU the kernels run in Triton's interpreter, so that the times mean nothing."""
    if args.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    for which, (constant, values) in CHOICES.items():
        cases: list[Case] = []
        for variant in args.variants:
            baseline: Case | None = None
            pairs = [(getattr(build, constant), build.MAX_WARPS)]
            pairs += [pair for pair in product(values, WARPS) if pair != pairs[0]]
            for value, warps in pairs:
                case = tuned_case(args, variant, which, {constant: value, "MAX_WARPS": warps}, dtype)
                baseline = case.baseline = baseline or case
                cases.append(case)
        measure(cases, args.device, args.rounds, clock=device_seconds, memory=False)
        columns = [*times("µs"), rate("GB", 1e9), *time_ratio("ratio to build.py")]
        remark = f"{args.tokens} tokens, width {args.dim}, {str(dtype)[6:]}; the first row of a variant is build.py's"
        report(f"tune-{which}: kernels, {which}", cases, columns, args.device, args.out, remark)


def tuned_case(
    args: argparse.Namespace, variant: str, which: str, constants: dict[str, int], dtype: torch.dtype
) -> Case:
    """Return one pass of a variant's mixture under these constants of build.py."""
    spec = FFNSpec(variant)
    tensors = operands(spec, args.tokens, hidden_width(args.dim, variant), args.device, dtype)
    function = mixture_function("triton", spec)
    labels = {"variant": variant, **{name: str(value) for name, value in constants.items()}}
    size = sum(t.nbytes for t in tensors if t is not None)
    first = tensors[0]
    assert first is not None
    if which == "forward":
        return Case(
            labels, partial(_with, constants, partial(inference, function, *tensors)), items=size + first.nbytes
        )
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    inputs = [leaf for leaf in leaves if leaf is not None]

    def backward(out: Tensor) -> object:
        return _with(constants, lambda: torch.autograd.grad(out, inputs, torch.ones_like(out)))

    return Case(labels, backward, items=2 * size + first.nbytes, prepare=lambda: function(*leaves))


def _with(constants: dict[str, int], call: Callable[[], object]) -> object:
    """Call with constants of build.py replaced."""
    before = {name: getattr(build, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(build, name, value)
        return call()
    finally:
        for name, value in before.items():
            setattr(build, name, value)
