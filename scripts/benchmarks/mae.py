"""A full training step of MAE ViT-B/16: ours with the GELU FFN against transformers' ViTMAEForPreTraining.

Mask ratio 0.75, 224 pixels, both with the same fused AdamW; bfloat16 autocast on a GPU, float32 on a CPU.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import nn

from .measure import Case, measure
from .options import MODES, add_common, add_compiler, in_mode
from .table import memory, rate, report, speed_ratio, times
from .training import adamw, autocast, precision_name, train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    parser.add_argument("--batch", type=int, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="both models compiled as well")
    parser.add_argument("--layers", type=int, default=12, help="blocks of both encoders (default: %(default)s)")
    add_compiler(parser)


def peers(device: torch.device, layers: int = 12) -> Iterator[tuple[str, nn.Module]]:
    """Theirs and ours, of the same size."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from moa_vision.mae import create_mae

    theirs: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, num_hidden_layers=layers))
    yield "transformers.ViTMAEForPreTraining", nn.Module.to(theirs, device)
    ours = create_mae("vit_base_patch16_gelu", img_size=224, encoder_args={"depth": layers})
    yield "moa_vision, gelu", ours.to(device)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    precision = autocast(args.device)
    baselines: dict[str, Case] = {}
    cases = []
    for (name, model), mode in product(peers(args.device, args.layers), MODES if args.compile else MODES[:1]):
        call = in_mode(model, mode, args.compiler)
        step = partial(train_step, lambda call=call: call(images).loss, adamw(model), precision)
        case = Case({"model": name, "mode": mode}, step, items=args.batch, baseline=baselines.get(mode))
        baselines.setdefault(mode, case)
        cases.append(case)
    measure(cases, args.device, args.rounds)
    columns = [*times(), rate("images"), *speed_ratio(), *memory()]
    remark = f"batch {args.batch}, {precision_name(precision)}, fused AdamW"
    report("mae: full training step, ViT-B/16", cases, columns, args.device, args.out, remark)
