"""A training step of MAE ViT-B/16 with the GELU FFN against transformers' ViTMAEForPreTraining.

Mask ratio 0.75, 224 pixels, fused AdamW for both; bfloat16 autocast on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.models import autocast, precision_name
from benchmarks.options import add_modes, add_number
from benchmarks.overhead import step_cases
from benchmarks.tables import memory, rate, report, speed_ratio, times
from benchmarks.timing import Case, measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_number(parser, "--batch", 32, "images a step")
    add_number(parser, "--layers", 12, "blocks of both encoders")
    add_modes(parser, ("uncompiled",))


def models(device: torch.device, layers: int) -> dict[str, nn.Module]:
    """Return both models by name."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from moa_vision.mae import create_mae

    theirs: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, num_hidden_layers=layers))
    ours = create_mae("vit_base_patch16_gelu", img_size=224, encoder_args={"depth": layers})
    return {"transformers.ViTMAEForPreTraining": nn.Module.to(theirs, device), "moa_vision, gelu": ours.to(device)}


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    cases: list[Case] = []
    for name, model in models(args.device, args.layers).items():
        added = step_cases({"model": name}, model, lambda call: call(images).loss, args.batch, args)
        for case, baseline in zip(added, cases[: len(added)] or added, strict=True):
            case.baseline, case.held_bytes = baseline, None  # activations, gradients and temporaries
        cases += added
    measure(cases, args.device, args.rounds)
    columns = [*times(), rate("images"), *speed_ratio(), *memory()]
    remark = f"batch {args.batch}, {precision_name(autocast(args.device))}, fused AdamW"
    report("mae: training step, ViT-B/16", cases, columns, args.device, args.out, remark)
