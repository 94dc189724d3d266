"""The paper's overhead table: one training step, each MoA against its baseline.

A step is forward, loss, backward and fused AdamW. The language model (Dense-0.5B in the paper, arXiv:2605.26647) has
relu2 as its Type-I baseline and swiglu as its Type-II one; the masked autoencoder (ViT-B/16) has gelu and swiglu.
Memory is the peak of a step, weights and optimizer state included. bfloat16 autocast on a GPU, float32 on a CPU.

The paper names neither device nor batch, and gives one figure for Type-II MoA; it stands beside every such variant.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moa_ffn import BACKENDS, FFNSpec

from .measure import Case, measure
from .options import (
    add_common,
    add_layers,
    add_modes,
    add_sized,
    add_variants,
    in_mode,
    layers_remark,
    with_baselines,
)
from .table import memory, note, rate, report, time_ratio, times
from .training import adamw, autocast, held_bytes, precision_name, train_step

MODELS = ("lm", "mae")
VARIANTS = ("relu2", "gelu", "moa", "swiglu", "onemoa", "bimoa", "qdmoa")


@dataclass(frozen=True)
class Figure:
    """The paper's time and memory of a step."""

    ms: int
    mib: int


PAPER = {
    "relu2": Figure(190, 26_571),
    "moa": Figure(196, 26_627),
    "swiglu": Figure(196, 28_759),
    **dict.fromkeys(("onemoa", "bimoa", "qdmoa"), Figure(222, 28_873)),
}
"""Dense-0.5B with torch.compile, arXiv:2605.26647."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    add_variants(parser, VARIANTS)
    add_modes(parser, cpu=("uncompiled", "compiled"), cuda=("compiled",))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="tables to make (default: both)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of every FFN (default: %(default)s)")
    add_sized(parser, "--size", "lm: a size of `python -m moa_lm sizes`", cpu="dense-0.12b", cuda="dense-0.5b")
    add_sized(parser, "--batch", "lm: sequences a step", cpu=2, cuda=8)
    add_sized(parser, "--sequence", "lm: tokens a sequence", cpu=256, cuda=2048)
    parser.add_argument("--vit-size", default="base", help="mae: tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="mae: pixels of a side (default: %(default)s)")
    add_sized(parser, "--images", "mae: images a step", cpu=8, cuda=256)
    add_layers(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and report both tables."""
    sizes = {"lm": f"{args.size}, {args.batch} x {args.sequence} tokens", "mae": f"ViT-{args.vit_size}/16, "}
    sizes["mae"] += f"{args.images} images of {args.image_size} pixels"
    for model in args.models:
        cases = measured_steps(args, model)
        remark = f"{sizes[model]}, {precision_name(autocast(args.device))}, FFN backend {args.backend}"
        remark += layers_remark(args)
        columns = [*times("ms"), rate("tokens" if model == "lm" else "images"), *time_ratio(), *memory()]
        if model == "lm":
            columns += [note(f"paper {what}") for what in ("ms", "ratio", "MiB", "memory ratio")]
            remark += "; the paper: dense-0.5b, compiled, device and batch not named, one Type-II MoA"
        name = "language model" if model == "lm" else "masked autoencoder"
        report(f"overhead-{model}: training step, {name}", cases, columns, args.device, args.out, remark)


def measured_steps(args: argparse.Namespace, model: str) -> list[Case]:
    """The table's cases; the models of one type are in memory together."""
    type_one, other = ("relu2", "gelu") if model == "lm" else ("gelu", "relu2")
    groups = with_baselines([name for name in args.variants if name != other], type_one)
    return [case for variants in groups.values() for case in measured_group(args, model, variants)]


def measured_group(args: argparse.Namespace, model: str, variants: list[str]) -> list[Case]:
    """The variants of one type, the baseline first, in every mode."""
    build = language_model if model == "lm" else masked_autoencoder
    items = args.batch * args.sequence if model == "lm" else args.images
    cases = []
    baselines: dict[str, Case] = {}
    for variant in variants:
        module, loss = build(args, variant)
        for mode, step, held in steps(module, loss, args):
            labels = {"type": "II" if FFNSpec(variant).type_two else "I", "variant": variant, "mode": mode}
            case = Case(labels, step, items, baseline=baselines.get(mode), held_bytes=held)
            case.notes = paper_columns(variant, variants[0]) if model == "lm" else {}
            baselines.setdefault(mode, case)
            cases.append(case)
    measure(cases, args.device, args.rounds)
    for case in cases:
        case.release()
    return cases


def steps(
    module: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], args: argparse.Namespace
) -> list[tuple[str, Callable[[], object], Callable[[], int]]]:
    """Mode, training step and bytes held, for every mode; one optimizer, so that a model is in memory once."""
    optimizer, precision = adamw(module), autocast(args.device)
    result = []
    for mode in args.modes:
        call = in_mode(module, mode, args.compiler)
        step = partial(train_step, partial(loss, call), optimizer, precision)
        result.append((mode, step, partial(held_bytes, module, optimizer)))
    return result


def language_model(args: argparse.Namespace, variant: str) -> tuple[nn.Module, Callable[[Callable[..., Any]], Tensor]]:
    """The model and its loss on random tokens, given the model's call."""
    from moa_lm import MoALlamaForCausalLM, named_config

    positions = max(2048, args.sequence)
    depth = {"num_hidden_layers": args.layers} if args.layers else {}
    config = named_config(args.size, variant, ffn_backend=args.backend, max_position_embeddings=positions, **depth)
    model: nn.Module = MoALlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (args.batch, args.sequence), device=args.device)

    def loss(call: Callable[..., Any]) -> Tensor:
        return call(input_ids=tokens, labels=tokens, use_cache=False).loss

    return nn.Module.to(model, args.device).train(), loss


def masked_autoencoder(
    args: argparse.Namespace, variant: str
) -> tuple[nn.Module, Callable[[Callable[..., Any]], Tensor]]:
    """The model and its loss on random images, given the model's call."""
    from moa_vision.mae import create_mae
    from moa_vision.vit import model_name

    name = model_name(args.vit_size, variant)
    depth, decoder = ({"depth": args.layers}, {"decoder_depth": args.layers}) if args.layers else ({}, {})
    settings = {"ffn_backend": args.backend, **depth}
    model = create_mae(name, img_size=args.image_size, encoder_args=settings, **decoder)
    images = torch.randn(args.images, 3, args.image_size, args.image_size, device=args.device)

    def loss(call: Callable[..., Any]) -> Tensor:
        return call(images).loss

    return model.to(args.device).train(), loss


def paper_columns(variant: str, baseline: str, paper: Mapping[str, Figure] = PAPER) -> dict[str, str]:
    """The paper's figures of a variant; nothing where it has none."""
    if variant not in paper:
        return {}
    own, other = paper[variant], paper[baseline]
    return {
        "paper ms": f"{own.ms}",
        "paper ratio": f"{own.ms / other.ms:.2f}",
        "paper MiB": f"{own.mib:,}",
        "paper memory ratio": f"{own.mib / other.mib:.3f}",
    }
