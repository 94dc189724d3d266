"""One layer, and its mixture alone, by every implementation: forward, backward and both.

Ratios of the layer refer to the fixed FFN of its type (gelu or swiglu) with backend "auto" in the same mode. `naive` is
the formula written out in plain torch; `liger` is Liger's fused SwiGLU (linkedin/Liger-Kernel), if installed, on a GPU.
GPU times are the device's own, with a full queue, as in training.

The mixture alone is the elementwise part between the projections. Its time is compared with that of a large copy of as
many bytes: inputs and result, and in the backward the gradient and the inputs' gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.options import add_modes, add_number, add_variants, in_mode, on_gpu, with_baselines
from benchmarks.tables import memory, note, rate, report, time_ratio, times
from benchmarks.timing import MIB, Case, copy_case, device_seconds, measure
from moa_ffn import BACKENDS, FFN, VARIANTS, Coefficients, FFNSpec, mixing_coefficients, mixture
from moa_ffn.backends import reference, unavailable_reason
from moa_train.errors import ConfigError

PASSES = {"forward": "forward without gradients", "backward": "backward alone", "both": "forward and backward"}
PARTS = ("layer", "mixture")
MIXTURES = ("eager", "cpu", "triton", "naive", "liger")
IMPLEMENTATIONS = tuple(dict.fromkeys((*BACKENDS, *MIXTURES)))
UNCOMPILED = ("cpu", "liger")
"""Implementations that gain nothing from torch.compile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, VARIANTS)
    add_modes(parser, ("uncompiled", "compiled"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: all")
    text = "default: auto, naive and liger for the layer, all available ones for the mixture"
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, help=text)
    add_number(parser, "--tokens", on_gpu(1600, 12800), "tokens; a masked image of 224 pixels has 50")
    add_number(parser, "--dim", 768, "model width")
    parser.add_argument("--copy-mib", type=int, help="size of the copy (default: 256 on a CPU, 1024 on a GPU)")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    reason = liger_unavailable_reason(args.device)
    if reason and "liger" in (args.implementations or ()):
        raise ConfigError(f"--implementations liger: {reason}")
    for which in args.passes:
        if "layer" in args.parts:
            benchmark_layer(args, which, dtype)
        if "mixture" in args.parts and which != "both":
            benchmark_mixture(args, which, dtype)


def benchmark_layer(args: argparse.Namespace, which: str, dtype: torch.dtype) -> None:
    """Measure one pass of every variant by every implementation in every mode."""
    x = torch.randn(args.tokens, args.dim, device=args.device, dtype=dtype, requires_grad=True)
    chosen = args.implementations or ["naive", *([] if liger_unavailable_reason(args.device) else ["liger"])]
    names = dict.fromkeys(["auto", *chosen])
    cases: list[Case] = []
    for mode, variants in product(args.modes, with_baselines(args.variants, "gelu").values()):
        baseline: Case | None = None
        for variant, name in product(variants, names):
            if (mode == "compiled" and name in UNCOMPILED) or (name == "liger" and variant != "swiglu"):
                continue
            layer = build_layer(name, args.dim, variant, args.device, dtype)
            labels = {"variant": variant, "implementation": name, "mode": mode, "hidden": str(layer.hidden_dim)}
            case = layer_case(layer, in_mode(layer, mode, args.compiler), x, which, labels)
            baseline = case.baseline = baseline or case
            cases.append(case)
    measure(cases, args.device, args.rounds, clock=device_seconds, memory=which != "backward")
    columns = [*times("ms"), rate("tokens"), *time_ratio(), *(memory() if which != "backward" else [])]
    remark = f"{args.tokens} tokens, width {args.dim}, {str(dtype)[6:]}; Type-I against gelu, Type-II against swiglu"
    report(f"ffn-layer-{which}: the layer, {PASSES[which]}", cases, columns, args.device, args.out, remark)


class NaiveFFN(FFN):
    """The layer as the formula, with every term in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `reference.ffn`."""
        return reference.ffn(self, x)


class LigerFFN(FFN):
    """SwiGLU with Liger's fused product."""

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        assert self.up_proj is not None
        return self.down_proj(liger_silu_mul(self.gate_proj(x), self.up_proj(x)))


def build_layer(name: str, dim: int, variant: str, device: torch.device, dtype: torch.dtype) -> FFN:
    """Return the layer by one of `IMPLEMENTATIONS`."""
    kind = {"naive": NaiveFFN, "liger": LigerFFN}.get(name, FFN)
    backend = name if name in BACKENDS else "eager"
    return kind(dim, hidden_width(dim, variant), variant, backend=backend, device=device, dtype=dtype)


def hidden_width(dim: int, variant: str) -> int:
    """Return 4 D for Type-I or 8/3 D for Type-II, which have as many parameters."""
    return dim * 8 // 3 if FFNSpec(variant).type_two else dim * 4


def layer_case(layer: nn.Module, call: Callable[..., Tensor], x: Tensor, which: str, labels: dict[str, str]) -> Case:
    """Return one pass of a layer; `call` is the layer, compiled or not."""
    inputs, grad = [x, *layer.parameters()], torch.randn_like(x)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad)

    if which == "backward":
        return Case(labels, backward, items=len(x), prepare=partial(call, x))
    return Case(labels, partial(inference, call, x) if which == "forward" else lambda: backward(call(x)), items=len(x))


def benchmark_mixture(args: argparse.Namespace, which: str, dtype: torch.dtype) -> None:
    """Measure the forward or backward of every variant's mixture by every implementation in every mode."""
    labels = {"variant": "large copy", "implementation": "torch", "mode": "", "hidden": ""}
    copy = copy_case(args.device, labels, args.copy_mib)
    cases = [copy]
    for variant in args.variants:
        spec, hidden = FFNSpec(variant), hidden_width(args.dim, variant)
        tensors = operands(spec, args.tokens, hidden, args.device, dtype)
        for name, mode in product(available_mixtures(args, spec, tensors[0]), args.modes):
            if mode == "uncompiled" or name not in (*UNCOMPILED, "triton"):
                labels = {"variant": variant, "implementation": name, "mode": mode, "hidden": str(hidden)}
                function = in_mode(mixture_function(name, spec), mode, args.compiler)
                case = mixture_case(function, tensors, which, labels)
                case.baseline = copy
                cases.append(case)
    for case in cases:
        case.notes["MiB moved"] = f"{case.items / MIB:,.1f}"
    measure(cases, args.device, args.rounds, clock=device_seconds, memory=False)
    columns = [*times("µs"), note("MiB moved"), rate("GB", 1e9), *time_ratio("x of the copy")]
    remark = f"{args.tokens} tokens, {str(dtype)[6:]}; small tensors that stay in a cache may be faster than the copy"
    report(f"ffn-mixture-{which}: the mixture alone, {which}", cases, columns, args.device, args.out, remark)


def available_mixtures(args: argparse.Namespace, spec: FFNSpec, a: Tensor | None) -> list[str]:
    """Return the requested implementations of the mixture, or all available ones."""
    assert a is not None

    def available(name: str) -> bool:
        if name == "liger":
            return spec.variant == "swiglu" and liger_unavailable_reason(a.device) is None
        return name == "naive" or unavailable_reason(name, a, spec) is None

    return [name for name in MIXTURES if available(name) and name in (args.implementations or MIXTURES)]


def mixture_function(name: str, spec: FFNSpec) -> Callable[..., Tensor]:
    """Return (a, b, mix, act) -> hidden by one of `MIXTURES`."""
    if name == "liger":
        return lambda a, b, mix, act: liger_silu_mul(a, b)
    if name != "naive":
        return lambda a, b, mix, act: mixture(a, b, mix, spec, name, act)

    def naive(a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None) -> Tensor:
        coefficients = Coefficients() if mix is None else mixing_coefficients(spec, mix)
        return reference.mixture(a, b, coefficients.matrix(a), spec.dictionaries, act)

    return naive


def operands(spec: FFNSpec, tokens: int, hidden: int, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """Return a (N, H), b (N, H) or None, logits or coefficients (N, n) or None, and act (P,) or None."""
    a, b = (torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2))
    mix = torch.randn(tokens, spec.num_coefficients, device=device, dtype=dtype) if spec.num_coefficients else None
    parameters = spec.num_activation_parameters
    act = torch.rand(parameters, device=device, dtype=dtype) if parameters else None
    return [a, b if spec.type_two else None, mix, act]


def mixture_case(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], which: str, labels: dict[str, str]
) -> Case:
    """Return one pass of a mixture; items are the bytes read and written."""
    size = sum(t.nbytes for t in tensors if t is not None)
    assert tensors[0] is not None
    grad = torch.randn_like(tensors[0])
    if which == "forward":
        return Case(labels, partial(inference, function, *tensors), items=size + grad.nbytes)

    def prepare() -> tuple[Tensor, list[Tensor]]:
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]  # Liger overwrites them
        return function(*leaves), [leaf for leaf in leaves if leaf is not None]

    def backward(prepared: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(*prepared, grad)

    return Case(labels, backward, items=2 * size + grad.nbytes, prepare=prepare)


def inference(call: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Return `call(*tensors)` without gradients."""
    with torch.no_grad():
        return call(*tensors)


def liger_unavailable_reason(device: torch.device) -> str | None:
    """Return why Liger cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None if device.type == "cuda" else f"Liger's kernels need a GPU, not {device.type}"


def liger_silu_mul(a: Tensor, b: Tensor) -> Tensor:
    """Return silu(a) * b. Its backward overwrites a and b."""
    return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(a, b)
