"""The cost of checkpoints in training: steps during which one is written, against the same steps alone.

MAE ViT-B/16 with AdamW: weights and two moments, with checksums, synced to the disk of --folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.models import adamw, autocast, precision_name, train_step
from benchmarks.options import add_number
from benchmarks.tables import report, time_ratio, times
from benchmarks.timing import Case, measure
from moa_train import checkpoint
from moa_train.checkpoint import Saver, Snapshot
from moa_vision.mae import create_mae


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_number(parser, "--batch", 32, "images a step")
    add_number(parser, "--steps", 4, "steps between checkpoints")
    add_number(parser, "--layers", 12, "blocks of the encoder")
    parser.add_argument("--folder", type=Path, help="parent folder of the checkpoints (default: the temporary one)")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    model = create_mae("vit_base_patch16_qdmoa", img_size=224, encoder_args={"depth": args.layers}).to(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    optimizer, precision, steps = adamw(model), autocast(args.device), count(1)
    step = partial(train_step, lambda: model(images).loss, optimizer, precision)
    step()  # creates the moments

    def train() -> None:
        for _ in range(args.steps):
            step()

    def copy() -> Snapshot:
        return checkpoint.snapshot(model, optimizer, {})

    with TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Path(folder), keep_latest=1)

        def saving(*, wait: bool) -> None:
            saver.begin({"step": next(steps)}, copy())
            if wait:
                saver.wait()
            train()

        settled: Callable[[], object] = saver.wait  # so that no write reaches into the next run
        what = f"{args.steps} steps"
        cases = [Case({"what": what}, lambda _: train(), prepare=settled)]
        for when, wait in (("during", False), ("before", True)):
            labels = {"what": f"{what}, a checkpoint written {when} them"}
            cases.append(Case(labels, lambda _, wait=wait: saving(wait=wait), prepare=settled, baseline=cases[0]))
        labels = {"what": "the copy to the CPU alone"}
        cases.append(Case(labels, lambda _: copy(), prepare=settled, baseline=cases[0]))
        measure(cases, args.device, args.rounds, memory=False)
        saver.wait()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6
    remark = f"batch {args.batch}, {precision_name(precision)}, a checkpoint of {size:,.0f} MB"
    report("saving: MAE ViT-B/16, qd-MoA", cases, [*times(), *time_ratio()], args.device, args.out, remark)
