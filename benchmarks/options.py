"""Command-line options that benchmarks share. Defaults depend on whether a GPU is available."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch

from moa_ffn import VARIANTS, FFNSpec

MODES = ("uncompiled", "compiled")
T = TypeVar("T")


def on_gpu(cpu: T, gpu: T) -> T:
    """Return a default for this machine."""
    return gpu if torch.cuda.is_available() else cpu


def common_parser() -> argparse.ArgumentParser:
    """Return the parent parser with --device, --rounds and --out."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", type=device, default=device(on_gpu("cpu", "cuda")), help="cpu or cuda")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/benchmarks"), help="folder of the CSV files (default: %(default)s)"
    )
    return parser


def add_number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    """Add an option for an integer of at least 1."""
    parser.add_argument(flag, type=positive, default=default, help=f"{text} (default: %(default)s)")


def add_variants(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add --variants."""
    text = f"FFNs out of {', '.join(VARIANTS)}; their baselines are added (default: {' '.join(default)})"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(default), metavar="VARIANT", help=text)


def add_modes(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add --modes and --compiler."""
    text = f"whether the benchmark applies torch.compile (default: {' '.join(default)})"
    parser.add_argument("--modes", nargs="+", choices=MODES, default=default, help=text)
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile (default: %(default)s)")


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Add --layers."""
    parser.add_argument("--layers", type=positive, help="blocks of each model (default: those of its size)")


def device(text: str) -> torch.device:
    """Parse an available device."""
    name = text.partition(":")[0]
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"{text!r} is not available; use cpu, or cuda on a machine with a GPU")
    return torch.device(text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def with_baselines(variants: Sequence[str], type_one: str) -> dict[str, list[str]]:
    """Return the variants by baseline, `type_one` or swiglu, each group headed by its baseline."""
    groups: dict[str, list[str]] = {}
    for baseline in (type_one, "swiglu"):
        two = FFNSpec(baseline).type_two
        members = [name for name in variants if FFNSpec(name).type_two == two and name != baseline]
        if members or baseline in variants:
            groups[baseline] = [baseline, *members]
    return groups


def in_mode(function: Callable[..., T], mode: str, compiler: str) -> Callable[..., T]:
    """Return `function`, in mode "compiled" compiled for fixed shapes.

    It gets a separate code object, because torch.compile limits recompilations per code object and one module class
    serves many models here.
    """
    if mode == "uncompiled":
        return function

    def call(*args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    return torch.compile(own, dynamic=False, backend=compiler)
