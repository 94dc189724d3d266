"""Validation losses over the held-out samples of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from moa_train.checkpoint import get_generators, set_generators
from moa_train.distributed import DistributedModel, sum_over_ranks
from moa_train.signals import StopRequests
from moa_train.task import WEIGHT, DataParallelRank, Task


@contextmanager
def evaluating(model: DistributedModel, device: torch.device) -> Iterator[None]:
    """Context of evaluation mode without gradients; the random generators are restored at its end."""
    generators = get_generators(device)
    model.bare.eval()
    with torch.no_grad():
        yield
    model.reshard()
    model.bare.train()
    set_generators(generators, device)


def validation_losses(
    task: Task, model: DistributedModel, rank: DataParallelRank, accelerator: Accelerator, stop: StopRequests
) -> dict[str, float] | None:
    """Return the mean held-out losses over all ranks by name.

    The result is {} if no sample could be used, and None if any rank was asked to stop. All ranks call it together.
    With FSDP2 they all take part in every forward pass; a rank without samples left repeats an example.
    """
    batches = iter(task.val_batches(rank))
    example = task.example_batch(1)
    sums = torch.zeros(1 + len(task.val_names), dtype=torch.float64)  # weights, then each loss
    while True:
        batch: Any = next(batches, None)
        stopped, left = sum_over_ranks(accelerator, bool(stop.received), batch is not None)
        if stopped:
            return None
        if not left:
            break
        if batch is None and not model.sharded:
            continue
        inputs = send_to_device(example if batch is None else batch, accelerator.device, non_blocking=True)
        losses = task.val_losses(model.bare, inputs)
        if batch is not None:
            values = torch.stack([losses[name] for name in task.val_names]).cpu().double()
            weights = losses[WEIGHT].cpu().double() if WEIGHT in losses else torch.ones(values.shape[1]).double()
            sums += torch.cat([weights.sum()[None], values @ weights])
    weight, *totals = sum_over_ranks(accelerator, *sums.tolist())
    return {name: total / weight for name, total in zip(task.val_names, totals, strict=True)} if weight else {}
