"""Block shapes and warps of the GPU kernels: time of each choice over that of the current one.

The choices are the fields of `build.Blocks`. The fastest ones over all variants are written to blocks.json in --out, by
name of the GPU; --save puts them into moa_ffn, whose kernels use them from then on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median

import torch
from torch import Tensor

from benchmarks.ffn import hidden_width, inference, mixture_function, operands
from benchmarks.options import add_number, add_variants, on_gpu
from benchmarks.tables import rate, report, time_ratio, times
from benchmarks.timing import Case, device_seconds, measure
from moa_ffn import FFNSpec
from moa_ffn.backends.triton import build

CHOICES = {
    "forward": {"vector_bytes": (4, 8, 16, 32), "forward_warps": (1, 2, 4, 8)},
    "backward": {"backward_elements": (1, 2, 4, 8), "backward_warps": (1, 2, 4, 8)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, ("swiglu", "moa", "qdmoa"))
    add_number(parser, "--tokens", on_gpu(64, 12800), "tokens")
    add_number(parser, "--dim", 768, "model width")
    parser.add_argument("--save", action="store_true", help="write the fastest choices to moa_ffn's blocks.json")


def run(args: argparse.Namespace) -> None:
    """Measure and report. On a CPU the kernels run in Triton's interpreter, so that the times mean nothing."""
    if args.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    name = build.device_name(args.device)
    best = before = build.tuned_blocks().get(name, build.Blocks())
    for which, choices in CHOICES.items():
        settings = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        current = {field: getattr(before, field) for field in choices}
        settings = [current, *(setting for setting in settings if setting != current)]
        cases: list[Case] = []
        for variant in args.variants:
            own = [tuned_case(args, variant, which, before._replace(**setting), dtype) for setting in settings]
            for case, setting in zip(own, settings, strict=True):
                case.labels |= {field: str(value) for field, value in setting.items()}
                case.baseline = own[0]
            cases += own
        measure(cases, args.device, args.rounds, clock=device_seconds, memory=False)
        columns = [*times("µs"), rate("GB", 1e9), *time_ratio("ratio to current")]
        remark = f"{args.tokens} tokens, width {args.dim}, {str(dtype)[6:]}; the first row of a variant is current"
        report(f"tune-{which}: kernels, {which}", cases, columns, args.device, args.out, remark)
        best = best._replace(**fastest(cases, settings))
        print(f"\nfastest on {name}: {best._asdict()}")
        for path in (args.out / "blocks.json", *((build.TUNED_BLOCKS,) if args.save else ())):
            write_blocks(path, name, best)


def fastest(cases: Sequence[Case], settings: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the setting with the lowest geometric mean of the time ratios; cases are variants times settings."""
    ratios = [median(case.time_ratios()) for case in cases]
    means = [geometric_mean(ratios[at :: len(settings)]) for at in range(len(settings))]
    return settings[means.index(min(means))]


def write_blocks(path: Path, name: str, blocks: build.Blocks) -> None:
    """Write the blocks of a GPU into a JSON file, next to those of others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {name: blocks._asdict()}, indent=2) + "\n", encoding="utf-8")


def tuned_case(args: argparse.Namespace, variant: str, which: str, blocks: build.Blocks, dtype: torch.dtype) -> Case:
    """Return one pass of a variant's mixture with these blocks."""
    spec = FFNSpec(variant)
    tensors = operands(spec, args.tokens, hidden_width(args.dim, variant), args.device, dtype)
    function = mixture_function("triton", spec)
    size = sum(t.nbytes for t in tensors if t is not None)
    first = tensors[0]
    assert first is not None
    using = partial(_with, build.device_name(args.device), blocks)
    if which == "forward":
        return Case({"variant": variant}, partial(using, partial(inference, function, *tensors)), size + first.nbytes)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    inputs = [leaf for leaf in leaves if leaf is not None]

    upstream = torch.ones_like(first)

    def backward(out: Tensor) -> object:
        return using(lambda: torch.autograd.grad(out, inputs, upstream))

    return Case({"variant": variant}, backward, 2 * size + first.nbytes, prepare=lambda: function(*leaves))


def _with(name: str, blocks: build.Blocks, call: Callable[[], object]) -> object:
    """Call with other blocks for a GPU."""
    tuned = build.tuned_blocks()
    before = dict(tuned)
    tuned[name] = blocks
    try:
        return call()
    finally:
        tuned.clear()
        tuned.update(before)
