"""MAE pre-training at a recipe's shapes: images/s, utilization, and what the data loader can feed.

Utilization is the achieved rate, three forward passes' matrix products per image, over the rate of a large matrix
product in the same precision, measured in the same rounds. The loader's rate is one core's times the available cores.
Images are random and on the device.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import torch

from benchmarks.loader import BATCH, add_loading, load, one_core
from benchmarks.models import autocast, held_bytes, precision_name, train_step
from benchmarks.options import add_modes, in_mode, on_gpu, positive
from benchmarks.tables import memory, note, rate, report, speed_ratio, times
from benchmarks.timing import Case, measure, product_case
from moa_train.config import read_config
from moa_train.environment import cpu_cores
from moa_train.errors import require
from moa_train.optim import build_optimizer
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD
from moa_vision.data import normalize
from moa_vision.mae import MAEOutput, forward_flops
from moa_vision.pretrain import MAEConfig, build_mae

RECIPE = Path(__file__).parents[1] / "configs/mae/vit_b16_qdmoa_800ep.yaml"
CPU_BATCH = 8
"""Default images of a step on a CPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_modes(parser, on_gpu(("uncompiled",), ("uncompiled", "compiled")))
    parser.add_argument("--config", type=Path, default=RECIPE, help=f"default: {RECIPE.name}")
    text = f"images a step (default: {CPU_BATCH} on a CPU, the recipe's micro-batch on a GPU)"
    parser.add_argument("--batch", type=positive, help=text)
    parser.add_argument("--product-size", type=positive, help="matrix product's size (default: 1024 CPU, 8192 GPU)")
    add_loading(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    config = as_config(MAEConfig, read_config(args.config))
    gpu = args.device.type == "cuda"
    bf16 = gpu and config.loop.precision == "bf16"
    batch = args.batch or (config.loop.micro_batch_size if gpu else CPU_BATCH)
    mae = build_mae(config.model).to(args.device).train()
    optimizer = build_optimizer(mae, config.optim, mae.no_weight_decay(), mae.hidden_matrices())
    precision = autocast(args.device, bf16)
    rows, columns = mae.grid_size
    image_size = (rows * mae.patch_size, columns * mae.patch_size)
    images = torch.randint(256, (batch, mae.in_chans, *image_size), dtype=torch.uint8, device=args.device)
    noise = torch.rand(batch, mae.num_patches, device=args.device)
    normalized = partial(normalize, images, config.data.mean, config.data.std)

    def step(call: Callable[..., MAEOutput]) -> None:
        train_step(lambda: call(normalized(), noise).loss, optimizer, precision)

    dtype = torch.bfloat16 if bf16 else torch.float32
    labels = {"recipe": "large matrix product", "mode": str(dtype)[6:]}
    product = product_case(args.device, dtype, labels, args.product_size)
    flops, held = TRAINING_FLOPS_PER_FORWARD * forward_flops(mae) * batch, partial(held_bytes, mae, optimizer)
    steps = []
    for mode in args.modes:
        labels = {"recipe": config.name, "mode": mode}
        call = partial(step, in_mode(mae, mode, args.compiler))
        steps.append(Case(labels, call, items=flops, baseline=product, held_bytes=held))
    measure([product, *steps], args.device, args.rounds)

    fed = loader_rate(args, config, image_size, mae.num_patches)
    heading = f"loader images/s, {cpu_cores()} cores"
    for case in steps:
        used = batch / case.median_s
        case.notes = {
            "images/s": f"{used:,.4g}",
            heading: f"{fed:,.4g}",
            "loader / step": f"{fed / used:.2f}",
        }
    columns = [*times("ms"), note("images/s"), rate("TFLOP", 1e12), *speed_ratio("utilization"), *memory()[:1]]
    columns += [note(heading), note("loader / step")]
    remark = f"{batch} images of {image_size[0]} pixels, {precision_name(precision)}, {config.optim.algorithm}"
    report("recipe: MAE pre-training step", [product, *steps], columns, args.device, args.out, remark)


def as_config(kind: type, tree: dict[str, Any]) -> Any:
    """Return the keys of a YAML config as its dataclass, without the parser of the command line."""
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        require(key, value, key in hints, f"a key of {kind.__name__}")
        hint = hints[key]
        types = (hint, *get_args(hint))
        if is_dataclass(hint):
            value = as_config(cast(type, hint), value)
        elif float in types and isinstance(value, str | int):  # YAML reads 4e-3 as text
            value = float(value)
        elif tuple in (get_origin(each) for each in types) and isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return kind(**values)


def loader_rate(args: argparse.Namespace, config: MAEConfig, image_size: tuple[int, int], num_patches: int) -> float:
    """Return images per second of the recipe's loader on all cores; NaN without webdataset."""
    if find_spec("webdataset") is None:
        return math.nan
    with one_core(args.shards) as (shards, index):
        data = replace(config.data, train=shards, val=None, workers=0)
        case = Case({}, partial(load, index, data, image_size, num_patches, args.batches), items=args.batches * BATCH)
        measure([case], torch.device("cpu"), args.rounds, memory=False)
    return cpu_cores() * case.items / case.median_s
