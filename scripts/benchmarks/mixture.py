"""The mixture alone against the time of a copy of as many bytes.

Bytes are those that have to be moved: forward a, b and coefficients in, the hidden tensor out; backward a, b,
coefficients and the hidden tensor's gradient in, the gradients of the first three out, and the recomputed hidden
tensor where the implementation hands it to the gradient of down_proj. Others have stored it; a column says which.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from moa_ffn import Coefficients, FFNSpec, mixing_coefficients
from moa_ffn.backends import compiled, eager, reference

from .liger import liger_unavailable_reason, silu_mul
from .measure import MIB, Case, device_seconds, measure
from .options import in_mode
from .table import note, rate, report, time_ratio, times
from .yardsticks import copy_case

IMPLEMENTATIONS = ("eager", "cpu", "triton", "naive", "liger")
UNCOMPILED = ("cpu", "triton", "liger")
"""Kernels, compiled as they are."""

T = TypeVar("T")
Forward = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor | None, Tensor | None, Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Mixture:
    """An implementation: a (N, H), b (N, H) or None, logits or constant coefficients (N, n) or None -> hidden (N, H).

    backward: for the same and the hidden tensor's gradient, the gradients and, last, the hidden tensor; None: by
        autograd through `forward`.
    """

    forward: Forward
    backward: Backward | None = None


def build(name: str, spec: FFNSpec) -> Mixture:
    """One of `IMPLEMENTATIONS`."""
    f, g = spec.gate_dictionary, spec.up_dictionary
    match name:
        case "eager" | "cpu":
            module = eager if name == "eager" else compiled

            def forward(a: Tensor, b: Tensor | None, mix: Tensor | None) -> Tensor:
                return module.forward(a, b, *_coefficients(spec, mix), f=f, g=g)

            def backward(a: Tensor, b: Tensor | None, mix: Tensor | None, grad: Tensor) -> Sequence[Tensor | None]:
                return module.backward(a, b, *_coefficients(spec, mix), grad=grad, f=f, g=g, with_output=True)

            return Mixture(forward, backward)
        case "naive":
            return Mixture(lambda a, b, mix: reference.mixture(a, b, coefficient_matrix(spec, a, mix), f, g))
        case "triton":
            kernels = importlib.import_module("moa_ffn.backends.triton")
            return Mixture(
                lambda a, b, mix: kernels.mixture(a, b, mix, spec),
                lambda a, b, mix, grad: kernels.mixture_backward(grad, a, b, mix, spec, with_output=True),
            )
        case _:
            return Mixture(lambda a, b, mix: silu_mul(a, b) if b is not None else a)


def hidden_width(dim: int, variant: str) -> int:
    """4 D for Type-I, 8/3 D for Type-II, which have as many parameters."""
    return dim * 8 // 3 if FFNSpec(variant).type_two else dim * 4


def unavailable_reason(name: str, spec: FFNSpec, a: Tensor) -> str | None:
    """Why an implementation cannot compute the mixture for a (N, H), or None."""
    match name:
        case "cpu":
            on_cpu = a.device.type == "cpu"
            return compiled.unavailable_reason() if on_cpu else f"it compiles for a CPU, not for {a.device.type}"
        case "triton":
            if importlib.util.find_spec("moa_ffn.backends.triton") is None:
                return "this version has no moa_ffn.backends.triton"
            return importlib.import_module("moa_ffn.backends.triton").unavailable_reason(a, spec)
        case "liger":
            return liger_unavailable_reason(a.device)
        case _:
            return None


def _coefficients(spec: FFNSpec, mix: Tensor | None) -> Coefficients:
    return Coefficients() if mix is None else mixing_coefficients(spec, mix)


def coefficient_matrix(spec: FFNSpec, a: Tensor, mix: Tensor | None) -> Tensor:
    """C (N, K1, K2) in a's dtype, from `mix` (N, n)."""
    gate, up, pair = _coefficients(spec, mix)
    if pair is not None:
        return pair
    one = a.new_ones(len(a), 1)
    return (one if gate is None else gate).unsqueeze(-1) * (one if up is None else up).unsqueeze(-2)


def benchmark_mixture(args: argparse.Namespace, which: str, dtype: torch.dtype) -> None:
    """Every variant by every implementation in every mode, forward or backward."""
    labels = {"variant": "large copy", "implementation": "torch", "mode": "", "hidden": ""}
    copy = copy_case(args.device, labels, args.copy_mib)
    copy.notes["MiB moved"] = f"{copy.items / MIB:,.1f}"
    cases = [copy]
    for variant in args.variants:
        spec, hidden = FFNSpec(variant), hidden_width(args.dim, variant)
        tensors = operands(spec, args.tokens, hidden, args.device, dtype)
        for name, mode in product(chosen(args, spec, dtype), args.modes):
            if mode == "compiled" and name in UNCOMPILED:
                continue
            labels = {"variant": variant, "implementation": name, "mode": mode, "hidden": str(hidden)}
            compiling = partial(in_mode, mode=mode, compiler=args.compiler)
            case = mixture_case(build(name, spec), tensors, which, compiling, labels)
            case.baseline = copy
            cases.append(case)
    measure(cases, args.device, args.rounds, clock=device_seconds, memory=False)
    columns = [*times("µs"), note("MiB moved"), *([note("hidden tensor")] if which == "backward" else [])]
    columns += [rate("GB", 1e9), *time_ratio("x of the copy floor")]
    remark = f"{args.tokens} tokens, {str(dtype)[6:]}; small tensors that stay in a cache may be faster than the copy"
    report(f"ffn-mixture-{which}: the mixture alone, {which}", cases, columns, args.device, args.out, remark)


def chosen(args: argparse.Namespace, spec: FFNSpec, dtype: torch.dtype) -> list[str]:
    """Implementations asked for, or all that can run.

    Raises:
        ValueError: one was asked for and cannot run.
    """
    able, a = [], torch.empty(0, 1, device=args.device, dtype=dtype)
    for name in args.implementations or IMPLEMENTATIONS:
        if name not in IMPLEMENTATIONS or (name == "liger" and spec.variant != "swiglu"):
            continue
        reason = unavailable_reason(name, spec, a)
        if reason and args.implementations:
            raise ValueError(f"--implementations {name}: {reason}")
        able += [] if reason else [name]
    return able


def operands(spec: FFNSpec, tokens: int, hidden: int, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """a (N, H), b (N, H) or None for Type-I, and logits or coefficients (N, n) or None for fixed FFNs."""
    a, b = (torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2))
    mix = torch.randn(tokens, spec.num_coefficients, device=device, dtype=dtype) if spec.num_coefficients else None
    return [a, b if spec.type_two else None, mix]


def mixture_case(
    mixture: Mixture,
    tensors: Sequence[Tensor | None],
    which: str,
    compiling: Callable[[Callable[..., Any]], Callable[..., Any]],
    labels: dict[str, str],
) -> Case:
    """One pass; `compiling` puts a function into its mode. Items are the bytes that a first run reads and writes."""
    operand = tensors[0]
    assert operand is not None
    grad = torch.randn_like(operand)
    read = [*tensors, *([grad] if which == "backward" else [])]
    if which == "forward" or mixture.backward is not None:
        call = compiling(mixture.forward if which == "forward" else mixture.backward or mixture.forward)
        case = Case(labels, partial(without_gradients, call, *read))
    else:
        call = compiling(mixture.forward)
        case = Case(labels, partial(backward, grad), prepare=partial(graph, call, tensors))
    written = case.call()()
    case.items = moved_bytes(read) + moved_bytes(written if isinstance(written, Sequence) else [written])
    case.notes["MiB moved"] = f"{case.items / MIB:,.1f}"
    case.notes["hidden tensor"] = "stored" if mixture.backward is None else "recomputed"
    return case


def moved_bytes(tensors: Sequence[object]) -> int:
    """Bytes of all tensors among them."""
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def without_gradients(call: Callable[..., T], *tensors: Tensor | None) -> T:
    """`call(*tensors)` outside of autograd."""
    with torch.no_grad():
        return call(*tensors)


def graph(call: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """A forward pass with gradients: its result, and fresh copies of the operands (Liger overwrites them)."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    return call(*leaves), [leaf for leaf in leaves if leaf is not None]


def backward(grad: Tensor, prepared: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
    """The backward pass of what `graph` returned."""
    out, leaves = prepared
    return torch.autograd.grad(out, leaves, grad)
