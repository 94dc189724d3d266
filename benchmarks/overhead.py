"""The paper's overhead table: one training step, each MoA against its baseline.

A step is forward, loss, backward and fused AdamW. The language model (Dense-0.5B in the paper, arXiv:2605.26647) has
the baselines relu2 (Type-I) and swiglu (Type-II); the masked autoencoder (ViT-B/16) has gelu and swiglu. Memory is the
peak of a step with weights and optimizer state. bfloat16 autocast on a GPU, float32 on a CPU.

The paper names neither device nor batch, and has one figure for Type-II MoA, which every such variant shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import adamw, autocast, held_bytes, language_model, lm_loss, precision_name, train_step
from benchmarks.options import add_layers, add_modes, add_number, add_variants, in_mode, on_gpu, with_baselines
from benchmarks.tables import memory, note, rate, report, time_ratio, times
from benchmarks.timing import Case, measure
from moa_ffn import BACKENDS, FFNSpec

VARIANTS = ("relu2", "gelu", "moa", "swiglu", "onemoa", "bimoa", "qdmoa")
TYPE_ONE_BASELINES = {"lm": "relu2", "mae": "gelu"}

PAPER = {"relu2": (190, 26_571), "moa": (196, 26_627), "swiglu": (196, 28_759)}
PAPER |= dict.fromkeys(("onemoa", "bimoa", "qdmoa"), (222, 28_873))
"""Milliseconds and MiB of a step of Dense-0.5B with torch.compile, arXiv:2605.26647."""

Loss = Callable[[Callable[..., Any]], Tensor]
"""The loss of a model, given the model's call, compiled or not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, VARIANTS)
    add_modes(parser, on_gpu(("uncompiled", "compiled"), ("compiled",)))
    models = tuple(TYPE_ONE_BASELINES)
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="default: both")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of every FFN (default: %(default)s)")
    parser.add_argument("--size", default=on_gpu("dense-0.12b", "dense-0.5b"), help="lm: default %(default)s")
    add_number(parser, "--batch", on_gpu(2, 8), "lm: sequences a step")
    add_number(parser, "--sequence", on_gpu(256, 2048), "lm: tokens a sequence")
    parser.add_argument("--vit-size", default="base", help="mae: tiny, small, base or large (default: %(default)s)")
    add_number(parser, "--image-size", 224, "mae: pixels of a side")
    add_number(parser, "--images", on_gpu(8, 256), "mae: images a step")
    add_layers(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and report both tables."""
    sizes = {"lm": f"{args.size}, {args.batch} x {args.sequence} tokens"}
    sizes["mae"] = f"ViT-{args.vit_size}/16, {args.images} images of {args.image_size} pixels"
    for model in args.models:
        kept = [name for name in args.variants if not other_baseline(name, model)]
        groups = with_baselines(kept, TYPE_ONE_BASELINES[model])
        cases = [case for variants in groups.values() for case in measured_group(args, model, variants)]
        remark = f"{sizes[model]}, {precision_name(autocast(args.device))}, FFN backend {args.backend}"
        remark += f", {args.layers} layers only" if args.layers else ""
        columns = [*times("ms"), rate("tokens" if model == "lm" else "images"), *time_ratio(), *memory()]
        if model == "lm":
            columns += [note(f"paper {what}") for what in ("ms", "ratio", "MiB", "memory ratio")]
        title = "language model" if model == "lm" else "masked autoencoder"
        report(f"overhead-{model}: training step, {title}", cases, columns, args.device, args.out, remark)


def other_baseline(variant: str, model: str) -> bool:
    """Return whether `variant` is the Type-I baseline of the other model."""
    return variant in TYPE_ONE_BASELINES.values() and variant != TYPE_ONE_BASELINES[model]


def measured_group(args: argparse.Namespace, model: str, variants: list[str]) -> list[Case]:
    """Measure the variants of one type, the baseline first, in every mode, with all models in memory."""
    build = language_step if model == "lm" else autoencoder_step
    items = args.batch * args.sequence if model == "lm" else args.images
    cases: list[Case] = []
    for variant in variants:
        labels = {"type": "II" if FFNSpec(variant).type_two else "I", "variant": variant}
        module, loss = build(args, variant)
        added = step_cases(labels, module, loss, items, args)
        for case, baseline in zip(added, cases[: len(added)] or added, strict=True):
            case.baseline = baseline
            case.notes = paper_notes(variant, variants[0]) if model == "lm" else {}
        cases += added
    measure(cases, args.device, args.rounds)
    for case in cases:
        case.release()
    return cases


def step_cases(
    labels: dict[str, str], module: nn.Module, loss: Loss, items: int, args: argparse.Namespace
) -> list[Case]:
    """Return a training step in every mode, with one optimizer for all of them."""
    optimizer, precision, cases = adamw(module), autocast(args.device), []
    for mode in args.modes:
        call = in_mode(module, mode, args.compiler)
        step = partial(train_step, partial(loss, call), optimizer, precision)
        held = partial(held_bytes, module, optimizer)
        cases.append(Case(labels | {"mode": mode}, step, items, held_bytes=held))
    return cases


def language_step(args: argparse.Namespace, variant: str) -> tuple[nn.Module, Loss]:
    """Return the language model and its loss on random tokens."""
    with args.device:  # initialization on a CPU takes longer than the measurement
        model = language_model(args.size, variant, args.sequence, args.layers, ffn_backend=args.backend)
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.sequence), device=args.device)
    return model.train(), lambda call: lm_loss(call, tokens)


def autoencoder_step(args: argparse.Namespace, variant: str) -> tuple[nn.Module, Loss]:
    """Return the masked autoencoder and its loss on random images."""
    from moa_vision.mae import create_mae
    from moa_vision.vit import model_name

    depth, decoder = ({"depth": args.layers}, {"decoder_depth": args.layers}) if args.layers else ({}, {})
    settings = {"ffn_backend": args.backend, **depth}
    name = model_name(args.vit_size, variant)
    with args.device:
        model = create_mae(name, img_size=args.image_size, encoder_args=settings, **decoder)
    images = torch.randn(args.images, 3, args.image_size, args.image_size, device=args.device)
    return model.train(), lambda call: call(images).loss


def paper_notes(variant: str, baseline: str) -> dict[str, str]:
    """Return the paper's figures of a variant, if it has any."""
    if variant not in PAPER:
        return {}
    (ms, mib), (base_ms, base_mib) = PAPER[variant], PAPER[baseline]
    ratios = {"paper ratio": f"{ms / base_ms:.2f}", "paper memory ratio": f"{mib / base_mib:.3f}"}
    return {"paper ms": str(ms), "paper MiB": f"{mib:,}", **ratios}
