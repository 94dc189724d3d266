"""One layer, and its mixture alone: forward, backward and both, ours and others', in time and peak memory.

The layer's ratios refer to the fixed FFN of its type (gelu or swiglu) with backend "auto" in the same mode. `naive`
is the formula written out in plain torch, every term stored; `liger` is Liger's fused SwiGLU, where it is installed
and the device is a GPU. On a GPU the time is the device's own, with a full queue, as in training.

The mixture alone is the elementwise part between the projections: a, b and the coefficients in, the hidden tensor
out. Its time is compared with the time that a large copy on the same device takes for as many bytes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from moa_ffn import BACKENDS, FFN, VARIANTS
from moa_ffn.backends import reference

from . import mixture
from .liger import liger_unavailable_reason, silu_mul
from .measure import Case, device_seconds, measure
from .options import add_common, add_modes, add_sized, add_variants, in_mode, with_baselines
from .table import memory, rate, report, time_ratio, times

PASSES = ("forward", "backward", "both")
PARTS = ("layer", "mixture")
PEERS = ("naive", "liger")
IMPLEMENTATIONS = tuple(dict.fromkeys((*BACKENDS, *mixture.IMPLEMENTATIONS, *PEERS)))
UNCOMPILED = ("cpu", "liger")
"""Never measured in mode compiled: two backends leave that to Inductor, Liger has kernels of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    add_variants(parser, VARIANTS)
    add_modes(parser, cpu=("uncompiled", "compiled"), cuda=("uncompiled", "compiled"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: both)")
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=PASSES,
        help="forward without gradients, backward alone, forward and backward (default: all three)",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="default: of the layer auto, naive and liger; of the mixture all; those that can run here",
    )
    add_sized(parser, "--tokens", "tokens; 50 a masked image of 224 pixels", cpu=1600, cuda=12800)
    parser.add_argument("--dim", type=int, default=768, help="model width (default: %(default)s)")
    parser.add_argument("--copy-mib", type=int, help="size of the copy (default: 256 on a CPU, 1024 on a GPU)")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    if "layer" in args.parts:
        for which in args.passes:
            benchmark_layer(args, which, dtype)
    if "mixture" in args.parts:
        for which in [name for name in args.passes if name != "both"]:
            mixture.benchmark_mixture(args, which, dtype)


class NaiveFFN(FFN):
    """The layer with every term of the sum stored, in plain autograd."""

    def forward(self, x: Tensor) -> Tensor:
        """As `FFN.forward`."""
        a = self.gate_proj(x)
        b = None if self.up_proj is None else self.up_proj(x)
        f, g = self.spec.gate_dictionary, self.spec.up_dictionary
        return self.down_proj(reference.mixture(a, b, self.mixing(x).to(a.dtype), f, g))


class LigerFFN(FFN):
    """SwiGLU with Liger's fused product."""

    def forward(self, x: Tensor) -> Tensor:
        """As `FFN.forward`."""
        assert self.up_proj is not None
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


def build_layer(name: str, dim: int, variant: str, device: torch.device, dtype: torch.dtype) -> FFN:
    """The layer by one of `IMPLEMENTATIONS`."""
    classes: dict[str, type[FFN]] = {"naive": NaiveFFN, "liger": LigerFFN}
    backend = name if name in BACKENDS else "eager"
    hidden = mixture.hidden_width(dim, variant)
    return classes.get(name, FFN)(dim, hidden, variant, backend=backend, device=device, dtype=dtype)


def layer_implementations(args: argparse.Namespace) -> list[str]:
    """Those asked for that are one of the layer, or the default ones that can run; "auto" first.

    Raises:
        ValueError: Liger was asked for and cannot run. (A backend says so itself.)
    """
    reason = liger_unavailable_reason(args.device)
    if args.implementations and "liger" in args.implementations and reason:
        raise ValueError(f"--implementations liger: {reason}")
    asked = args.implementations or ["naive", *([] if reason else ["liger"])]
    return list(dict.fromkeys(["auto", *(name for name in asked if name in (*BACKENDS, *PEERS))]))


def benchmark_layer(args: argparse.Namespace, which: str, dtype: torch.dtype) -> None:
    """Every variant by every implementation in every mode, for one pass."""
    x = torch.randn(args.tokens, args.dim, device=args.device, dtype=dtype, requires_grad=True)
    implementations, groups = layer_implementations(args), with_baselines(args.variants, "gelu")
    cases: list[Case] = []
    for mode, (baseline, variants) in product(args.modes, groups.items()):
        first: Case | None = None
        for variant, name in product(variants, implementations):
            if (mode == "compiled" and name in UNCOMPILED) or (name == "liger" and variant != "swiglu"):
                continue
            layer = build_layer(name, args.dim, variant, args.device, dtype)
            labels = {"variant": variant, "implementation": name, "mode": mode, "hidden": str(layer.hidden_dim)}
            case = layer_case(layer, in_mode(layer, mode, args.compiler), x, which, labels)
            first = case.baseline = first or case
            cases.append(case)
        assert first is None or first.labels["variant"] == baseline
    measure(cases, args.device, args.rounds, clock=device_seconds, memory=which != "backward")
    columns = [*times("ms"), rate("tokens"), *time_ratio(), *(memory() if which != "backward" else [])]
    remark = f"{args.tokens} tokens, width {args.dim}, {str(dtype)[6:]}; Type-I against gelu, Type-II against swiglu"
    titles = {"forward": "forward without gradients", "backward": "backward alone", "both": "forward and backward"}
    report(f"ffn-layer-{which}: the layer, {titles[which]}", cases, columns, args.device, args.out, remark)


def layer_case(layer: nn.Module, call: Callable[..., Tensor], x: Tensor, which: str, labels: dict[str, str]) -> Case:
    """One pass of a layer; `call` is the layer, maybe compiled."""
    inputs, grad = [x, *layer.parameters()], torch.randn_like(x)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad)

    runs = {
        "forward": partial(mixture.without_gradients, call, x),
        "both": lambda: backward(call(x)),
        "backward": backward,
    }
    prepare = partial(call, x) if which == "backward" else None
    return Case(labels, runs[which], items=len(x), prepare=prepare)
