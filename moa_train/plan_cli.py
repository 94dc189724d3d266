"""Options and output of scripts/plan.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moa_train.config import RunConfig
from moa_train.devices import GPUS
from moa_train.estimate import GIB, Estimate, Target, Workload, estimate, muon_flops
from moa_train.plan import ASSUMED_UTILIZATION
from moa_train.progress import count


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options; all other words of the command line are keys of the config."""
    parser = argparse.ArgumentParser(
        prog="plan.py",
        usage="%(prog)s --config FILE [options] [--KEY.SUBKEY VALUE ...]",
        description="Estimate memory, hours, loader cores and checkpoint size of a run on target hardware.",
        epilog="Any key of the config can be set as in training: --loop.micro_batch_size 32. Neither data nor weights "
        "are needed. Formulas and their limits: docs/planning.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, action="append", required=True, metavar="FILE", help="vision or language config")
    add("--gpus", type=_counts, default=[8], metavar="N[,N...]", help="numbers of devices (default: 8)")
    names = [gpu.option for gpu in GPUS]
    add("--gpu", type=str.lower, choices=names, default="h200", help="device (default: %(default)s)")
    add("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="default: %(default)s")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--utilization", type=float, metavar="X", help=f"fraction of the bf16 peak (default: {ASSUMED_UTILIZATION})"
    )
    rate.add_argument("--measured", type=Path, metavar="RUN", help="take the throughput of a run folder")
    add("--images", type=int, metavar="N", help="training images (default: local shards, else ImageNet-1k)")
    add("--tokens", type=int, metavar="N", help="training tokens, for schedule.epochs")
    add("--decode-rate", type=float, default=318.0, metavar="N", help="images/s per core (default: 318)")
    return parser


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers above 0")
    return counts


def print_plan(config: RunConfig, workload: Workload, target: Target, gpus: Sequence[int]) -> None:
    """Print the workload, and a Markdown table with a row for each number of devices."""
    estimates = [estimate(config, workload, target, number) for number in gpus]
    states, saved, plan = workload.states, workload.saved, estimates[0].plan
    units = plan.total_steps * plan.global_batch * workload.units_per_sample
    lines = {
        "model": workload.title,
        "parameters": ", ".join(f"{name} {count(number)}" for name, number in workload.parameters.items()),
        "work": f"{count(workload.flops_per_sample / workload.units_per_sample)}FLOPs per {workload.unit} in training, "
        f"{count(muon_flops(workload.muon, 1, 'ddp'))}FLOPs per step for Muon",
        "states": f"weights {states.weights / GIB:,.2f} GiB, gradients {states.gradients / GIB:,.2f}, "
        f"moments {states.moments / GIB:,.2f}",
        "activations": f"{saved.fixed / GIB:,.2f} GiB and {saved.per_sample / 2**20:,.1f} MiB per sample (eager mode)",
        "steps": f"{plan.total_steps:,} ({plan.warmup_steps:,} of warm-up), {units:,} {workload.unit}",
        "device": f"{target.gpu.name}, {target.parallel}, {target.source}",
        "assumed": "; ".join((*workload.assumed, "communication hides behind compute")),
    }
    for title, text in lines.items():
        print(f"{title:<11} {text}")
    print(f"\n{markdown_table(estimates)}")
    if not all(found.fits for found in estimates):
        print("\nTo reduce memory: --parallel fsdp2, more or larger GPUs, model.gradient_checkpointing (language).")


def markdown_table(estimates: Sequence[Estimate]) -> str:
    """Return a Markdown table with a row for each estimate."""
    columns = ("GPUs", "micro-batch x accumulated", "memory per GPU", "step, ms", "hours", "samples/s", "loader cores")
    rows: list[tuple[str, ...]] = [(*columns, "checkpoint")]
    for found in estimates:
        plan = found.plan
        rows.append(
            (
                str(found.gpus) if plan.world_size == found.gpus else f"{found.gpus} ({plan.world_size} used)",
                f"{plan.micro_batch} x {plan.accumulation}",
                f"{found.memory / GIB:,.1f} GiB" + ("" if found.fits else ", does not fit"),
                f"{1000 * found.step_s:,.1f}",
                f"{found.hours:,.2f}",
                f"{found.samples_per_s:,.0f}",
                f"{found.cores:,.0f}",
                f"{found.checkpoint_bytes / GIB:,.2f} GiB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = (" | ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    rule = "|".join("-" * (width + 1) + ":" for width in widths)
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in body)])
