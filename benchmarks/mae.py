"""A training step of MAE ViT-B/16 with the GELU FFN against transformers' ViTMAEForPreTraining.

Mask ratio 0.75, 224 pixels, fused AdamW for both; bfloat16 autocast on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn

from benchmarks.models import adamw, autocast, precision_name, train_step
from benchmarks.options import add_modes, add_number, in_mode
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
    precision, cases = autocast(args.device), []
    baselines: dict[str, Case] = {}
    for name, model in models(args.device, args.layers).items():
        optimizer = adamw(model)
        for mode in args.modes:
            call = in_mode(model, mode, args.compiler)
            step = partial(train_step, lambda call=call: call(images).loss, optimizer, precision)
            case = Case({"model": name, "mode": mode}, step, items=args.batch, baseline=baselines.get(mode))
            baselines.setdefault(mode, case)
            cases.append(case)
    measure(cases, args.device, args.rounds)
    columns = [*times(), rate("images"), *speed_ratio(), *memory()]
    remark = f"batch {args.batch}, {precision_name(precision)}, fused AdamW"
    report("mae: training step, ViT-B/16", cases, columns, args.device, args.out, remark)
