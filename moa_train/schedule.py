"""How long a run is, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

DecayType = Literal["cosine", "linear", "1-sqrt"]
DECAY_SHAPES: tuple[str, ...] = get_args(DecayType)


class Budget(NamedTuple):
    """Optimizer steps of a run, and of its warm-up."""

    total_steps: int
    warmup_steps: int


def lr_at(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int | None = None,
    shape: DecayType = "cosine",
) -> float:
    """Return the learning rate of the optimizer step that follows `step` finished ones.

    Linear from 0 over the first `warmup_steps`, then `lr`, then from `lr` to `min_lr` over the last `decay_steps`.
    With all steps after the warm-up in the decay, the default, and half a cosine it is the MAE recipe
    (facebookresearch/mae, util/lr_sched.py), step by step rather than epoch by epoch; with fewer it is
    warmup-stable-decay (arXiv:2404.06395). With p the part of the decay that is done, the rate above `min_lr` falls
    as (1 + cos(pi p)) / 2, as 1 - p, or as 1 - sqrt(p) (arXiv:2405.18392).
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    if decay_steps is None:
        decay_steps = total_steps - warmup_steps
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / max(1, decay_steps)))
    left = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[shape]
    return min_lr + (lr - min_lr) * left
