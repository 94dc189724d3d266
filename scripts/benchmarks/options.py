"""Command-line options that benchmarks share, and what they mean for the device."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch

from moa_ffn import VARIANTS, FFNSpec

MODES = ("uncompiled", "compiled")
T = TypeVar("T")


def add_common(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """--device, --rounds and --out."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=device(best), help="torch device (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="measured rounds after the warm-up (default: %(default)s)"
    )
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out."""
    parser.add_argument(
        "--out", type=Path, default=Path("reports/benchmarks"), help="folder of the CSV files (default: %(default)s)"
    )


def add_variants(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """--variants: FFNs; the fixed ones that ratios refer to come in by themselves."""
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(default),
        metavar="VARIANT",
        help=f"FFNs to measure, of {', '.join(VARIANTS)}; their baselines are added (default: {' '.join(default)})",
    )


def add_modes(parser: argparse.ArgumentParser, cpu: Sequence[str], cuda: Sequence[str]) -> None:
    """--modes and --compiler."""
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="nothing compiled by the caller, or the whole by torch.compile "
        f"(default: {' and '.join(cpu)} on a CPU, {' and '.join(cuda)} on a GPU)",
    )
    parser.set_defaults(default_modes={"cpu": tuple(cpu), "cuda": tuple(cuda)})
    add_compiler(parser)


def add_compiler(parser: argparse.ArgumentParser) -> None:
    """--compiler."""
    parser.add_argument(
        "--compiler", default="inductor", help="torch.compile's backend in mode compiled (default: %(default)s)"
    )


def add_sized(parser: argparse.ArgumentParser, flag: str, what: str, *, cpu: Any, cuda: Any) -> None:
    """An option whose default depends on the device; `for_device` reads it."""
    kind = positive if isinstance(cpu, int) else type(cpu)
    parser.add_argument(flag, type=kind, help=f"{what} (default: {cpu} on a CPU, {cuda} on a GPU)")
    defaults: dict[str, Any] = {
        **(parser.get_default("by_device") or {}),
        flag.strip("-").replace("-", "_"): (cpu, cuda),
    }
    parser.set_defaults(by_device=defaults)


def add_layers(parser: argparse.ArgumentParser) -> None:
    """--layers."""
    parser.add_argument("--layers", type=positive, help="blocks of every model, for a quick try (default: its size's)")


def layers_remark(args: argparse.Namespace) -> str:
    """What stands above a table where --layers was given."""
    return f", {args.layers} layers only" if args.layers else ""


def for_device(args: argparse.Namespace) -> None:
    """Fill in what was left to the device."""
    gpu = "device" in args and isinstance(args.device, torch.device) and args.device.type == "cuda"
    for name, values in getattr(args, "by_device", {}).items():
        if getattr(args, name) is None:
            setattr(args, name, values[gpu])
    if "default_modes" in args and args.modes is None:
        args.modes = args.default_modes["cuda" if gpu else "cpu"]


def device(text: str) -> torch.device:
    """A torch device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"{text!r} is not here; allowed: cpu, and cuda where there is a GPU")
    return found


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def with_baselines(variants: Sequence[str], type_one: str, type_two: str = "swiglu") -> dict[str, list[str]]:
    """The variants by baseline, each group with its baseline first."""
    groups: dict[str, list[str]] = {}
    for baseline in (type_one, type_two):
        two = FFNSpec(baseline).type_two
        members = [name for name in variants if FFNSpec(name).type_two == two and name != baseline]
        if members or baseline in variants:
            groups[baseline] = [baseline, *members]
    return groups


def in_mode(function: Callable[..., T], mode: str, compiler: str) -> Callable[..., T]:
    """`function`, compiled for fixed shapes in mode "compiled".

    With a code object of its own: torch.compile keeps its variants, and its limit of them, by code object, and here
    one module class serves many models.
    """
    if mode == "uncompiled":
        return function

    def call(*args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    return torch.compile(own, dynamic=False, backend=compiler)
