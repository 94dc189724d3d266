"""MAE pre-training at a recipe's shapes: images/s, utilization, what the loader can feed, the step split by part.

Utilization is the achieved rate, three forward passes' matrix products an image, over the rate of a large matrix
product in the same precision, measured in the same rounds. The loader's rate is one core's times the cores that this
process may use. The second table splits the uncompiled step; its remainder is what the step took, measured whole in
the same rounds, beyond the sum of its parts. Images are random and on the device already.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import FFN
from moa_train.config import parse_config
from moa_train.optim import build_optimizer
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD
from moa_vision.data import normalize
from moa_vision.mae import MAEOutput, forward_flops
from moa_vision.pretrain import MAEConfig, build_mae

from .loader import BATCH, add_loading, load, one_core
from .measure import Case, measure
from .options import add_common, add_modes, in_mode, positive
from .table import memory, note, rate, report, speed_ratio, times, write
from .timeline import PARTS, PHASES, Part, Timeline, clock, counter, marked, split_step
from .training import autocast, held_bytes, precision_name, train_step
from .yardsticks import product_case

RECIPE = Path(__file__).parents[2] / "configs/mae/vit_b16_qdmoa_800ep.yaml"
CPU_BATCH = 8
PRECISIONS = ("float32", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    add_modes(parser, cpu=("uncompiled",), cuda=("uncompiled", "compiled"))
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[RECIPE], help=f"recipes to measure (default: {RECIPE.name})"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        help=f"images a step (default: {CPU_BATCH} on a CPU, the recipe's micro-batch on a GPU)",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: float32 on a CPU, the recipe's on a GPU; bf16 is autocast"
    )
    parser.add_argument("--product-size", type=positive, help="matrix product's size (default: 1024 CPU, 8192 GPU)")
    add_loading(parser)


class Training:
    """A model with its optimizer, as a configuration has them, and a batch of random images.

    Args:
        path: configuration of MAE pre-training; its data are not read.
        args: this benchmark's options.
    """

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.config = parse_config(
            MAEConfig, [f"--config={path}"], program="benchmark.py recipe", summary="MAE pre-training"
        )
        gpu, loop = args.device.type == "cuda", self.config.loop
        precision = args.precision or (loop.precision if gpu else "float32")
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.precision = autocast(args.device, precision == "bf16")
        self.batch: int = args.batch or (loop.micro_batch_size if gpu else CPU_BATCH)
        self.mae = build_mae(self.config.model).to(args.device).train()
        self.optimizer = build_optimizer(self.mae, self.config.optim, self.mae.no_weight_decay())
        rows, columns = self.mae.grid_size
        self.image_size = (rows * self.mae.patch_size, columns * self.mae.patch_size)
        shape = (self.batch, self.mae.in_chans, *self.image_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
        self.noise = torch.rand(self.batch, self.mae.num_patches, device=args.device)

    def loss(self, call: Callable[..., MAEOutput]) -> Tensor:
        """The batch's loss by the model, maybe compiled, as in pre-training."""
        return call(normalize(self.images, self.config.data.mean, self.config.data.std), self.noise).loss

    def step(self, call: Callable[..., MAEOutput]) -> Callable[[], None]:
        """A whole training step."""
        return partial(train_step, partial(self.loss, call), self.optimizer, self.precision)

    def split(self, timeline: Timeline[Any]) -> dict[Part, float]:
        """A training step by part."""
        with marked(self.mae, timeline):
            return split_step(partial(self.loss, self.mae), self.optimizer, self.precision, timeline)


def run(args: argparse.Namespace) -> None:
    """Measure and report both tables."""
    steps: list[Case] = []
    parts: list[list[str]] = []
    batches = set()
    for path in args.config:
        training = Training(path, args)
        batches.add(f"{training.batch} images of {training.image_size[0]} pixels, {precision_name(training.precision)}")
        cases = step_cases(training, args)
        add_loader(cases[1:], training, args)
        steps += cases
        parts += part_lines(training, cases[0], args)
        for case in cases:
            case.release()
    remark = f"{'; '.join(sorted(batches))}, fused AdamW; utilization of the product above"
    columns = [*times("ms"), note("images/s"), rate("TFLOP", 1e12), *speed_ratio("utilization"), *memory()[:1]]
    columns += [note(f"loader images/s, {cores()} cores"), note("loader / step")]
    report("recipe: MAE pre-training step", steps, columns, args.device, args.out, remark)
    head = ["recipe", "part", "forward ms", "backward ms", "both ms", "share", "GFLOP", "utilization"]
    remark = f"{'; '.join(sorted(batches))}; uncompiled, medians of {args.rounds} rounds"
    write("recipe-parts: the step by part", head, parts, args.device, args.out, remark)


def step_cases(training: Training, args: argparse.Namespace) -> list[Case]:
    """A large product, and the training step in every mode; items are floating-point operations."""
    labels = {"recipe": "large matrix product", "mode": str(training.dtype)[6:]}
    product = product_case(args.device, training.dtype, labels, args.product_size)
    flops = TRAINING_FLOPS_PER_FORWARD * forward_flops(training.mae) * training.batch
    cases = [product]
    for mode in args.modes:
        call = in_mode(training.mae, mode, args.compiler)
        labels = {"recipe": training.config.name, "mode": mode}
        held = partial(held_bytes, training.mae, training.optimizer)
        cases.append(Case(labels, training.step(call), items=flops, baseline=product, held_bytes=held))
    measure(cases, args.device, args.rounds)
    for case in cases[1:]:
        case.notes["images/s"] = f"{training.batch / case.median_s:,.4g}"
    return cases


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_loader(steps: list[Case], training: Training, args: argparse.Namespace) -> None:
    """Note what the recipe's loader could feed on this host, and how that compares with each step."""
    with one_core(args.shards) as (shards, index):
        data = replace(training.config.data, train=shards, val=None, workers=0)
        run = partial(load, index, data, training.image_size, training.mae.num_patches, args.batches)
        case = Case({}, run, items=args.batches * BATCH)
        measure([case], torch.device("cpu"), args.rounds, memory=False)
    fed = cores() * case.items / case.median_s
    for step in steps:
        step.notes[f"loader images/s, {cores()} cores"] = f"{fed:,.4g}"
        step.notes["loader / step"] = f"{fed * step.median_s / training.batch:.2f}"


def part_lines(training: Training, product: Case, args: argparse.Namespace) -> list[list[str]]:
    """The second table's lines of one model."""
    splits: list[dict[Part, float]] = []
    timeline = clock(args.device)
    split = Case({}, lambda: splits.append(training.split(timeline)))
    whole = Case({}, training.step(training.mae))
    measure([whole, split], args.device, args.rounds, memory=False)
    spent = {part: statistics.median(s[part] for s in splits[-args.rounds :]) for part in splits[-1]}
    work = operations(training)
    peak = product.items / product.median_s
    lines = []

    def line(part: str, forward: float | None, backward: float | None, total: float, flops: float) -> None:
        cells = ["" if value is None else f"{1e3 * value:.4g}" for value in (forward, backward, total)]
        cells += [f"{total / whole.median_s:.1%}", f"{flops / 1e9:,.4g}" if flops else ""]
        lines.append([training.config.name, part, *cells, f"{flops / total / peak:.1%}" if flops else ""])

    for part in PARTS:
        keys = [("forward", part), ("backward", part)]
        forward, backward = (spent[key] for key in keys)
        line(part, forward, backward, forward + backward, sum(work[key] for key in keys))
    line("optimizer", None, None, spent["optimizer", "optimizer"], 0)
    line("remainder", None, None, whole.median_s - sum(spent.values()), 0)
    forward, backward = (sum(spent[phase, part] for part in PARTS) for phase in PHASES)
    line("step", forward, backward, whole.median_s, sum(work.values()))
    return lines


def operations(training: Training) -> dict[Part, float]:
    """Floating-point operations of matrix products in one step, by part, counted by torch."""
    ffns = [module for module in training.mae.modules() if isinstance(module, FFN)]
    backends = [ffn.backend for ffn in ffns]
    for ffn in ffns:
        ffn.backend = "eager"  # the same products, and each of them seen
    try:
        with FlopCounterMode(display=False) as flops:
            return training.split(counter(flops))
    finally:
        for ffn, backend in zip(ffns, backends, strict=True):
            ffn.backend = backend
