"""What a checkpoint costs training: steps beside which one is written, against the same steps alone.

MAE ViT-B/16 with AdamW: weights and two moments, with checksums and synced to the disk, in the folder --folder.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moa_train import checkpoint
from moa_train.checkpoint import Saver, Snapshot
from moa_vision.mae import create_mae

from .measure import Case, measure
from .options import add_common, positive
from .table import report, time_ratio, times
from .training import adamw, autocast, precision_name, train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    parser.add_argument("--batch", type=positive, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=4, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=12, help="blocks of the encoder (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go for the while (default: the temporary one)")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    model = create_mae("vit_base_patch16_qdmoa", img_size=224, encoder_args={"depth": args.layers}).to(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    optimizer, precision, steps = adamw(model), autocast(args.device), count(1)
    step = partial(train_step, lambda: model(images).loss, optimizer, precision)
    step()  # from here on there are moments

    def train() -> None:
        for _ in range(args.steps):
            step()

    def copied() -> Snapshot:
        return checkpoint.snapshot(model, optimizer, {})

    with TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Path(folder), keep_latest=1)

        def saving(*, wait: bool) -> None:
            saver.begin({"step": next(steps)}, copied())
            if wait:
                saver.wait()
            train()

        settled: Callable[[], object] = saver.wait  # the last one's writing is no one else's time
        what = f"{args.steps} steps"
        cases = [Case({"what": what}, lambda _: train(), prepare=settled)]
        for place, wait in (("beside", False), ("before", True)):
            labels = {"what": f"{what}, a checkpoint written {place} them"}
            cases.append(Case(labels, lambda _, wait=wait: saving(wait=wait), prepare=settled, baseline=cases[0]))
        cases.append(
            Case({"what": "the copy to the CPU alone"}, lambda _: copied(), prepare=settled, baseline=cases[0])
        )
        measure(cases, args.device, args.rounds, memory=False)
        saver.wait()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6
    remark = f"batch {args.batch}, {precision_name(precision)}, a checkpoint of {size:,.0f} MB"
    report("saving: MAE ViT-B/16, qd-MoA", cases, [*times(), *time_ratio()], args.device, args.out, remark)
