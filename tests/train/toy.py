"""A task of a few hundred parameters with everything that can break a resume: dropout, epochs, a loader that draws
from the global generator. Run as a script it is a main like the real ones."""

import importlib
import itertools
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from moa_train.config import RESUME_MUTABLE_KEYS, EpochSchedule, RunConfig, parse_config
from moa_train.trainer import run


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    """The toy.

    Args:
        width: Hidden width.
        dropout: Dropout rate.
        nan_at: The step (from 0) that is not finite; -1 is none.
        nan_for: How many steps from there on.
        nan_in: What of it: the "loss" and so the gradient, the "loss alone", or of one bias the "gradient", or
            "infinite gradient", alone.
        nan_on: The rank whose part of the step it is; -1: all.
        high_at: The step whose loss is a hundredfold; -1 is none.
        stop_at: The step in which SIGTERM comes; -1 is none.
        stop_in_val: The first validation at or after this step gets SIGTERM; -1 is none.
        step_s: Seconds that a step is made to last.
        max_file: Bytes that a file may have, as if the disk were full then; 0: no limit.
        kill_in: "MODULE:FUNCTION" of moa_train (or of this file), in the middle of which kill -9 comes; "" is none.
        kill_call: In which call of it, from 1.
    """

    width: int = 8
    dropout: float = 0.2
    nan_at: int = -1
    nan_for: int = 1
    nan_in: str = "loss"
    nan_on: int = -1
    high_at: int = -1
    stop_at: int = -1
    stop_in_val: int = -1
    step_s: float = 0.0
    max_file: int = 0
    kill_in: str = ""
    kill_call: int = 1


TROUBLE = {
    f"model.{key}"
    for key in (
        "nan_at",
        "nan_for",
        "nan_in",
        "nan_on",
        "high_at",
        "stop_at",
        "stop_in_val",
        "step_s",
        "max_file",
        "kill_in",
        "kill_call",
    )
}


NOT_FINITE = {
    "loss": lambda loss, bias: loss * math.nan,
    "loss alone": lambda loss, bias: loss + math.nan,
    "gradient": lambda loss, bias: loss + (0 * bias).abs().sum().sqrt(),
    "infinite gradient": lambda loss, bias: loss + (bias - bias.detach()).sum().sqrt(),
}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """A toy run.

    Args:
        model: The model.
        schedule: How long.
        samples: Training samples.
    """

    model: ToyModel = field(default_factory=ToyModel)
    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    samples: int = 44


def sample(seed, epoch, position):
    generator = torch.Generator().manual_seed(seed * 1_000_000 + epoch * 1000 + position)
    x = torch.randn(3, generator=generator)
    return x, (x.sin().sum(0, keepdim=True) + 0.1 * torch.randn(1, generator=generator))


class Batches(IterableDataset):
    def __init__(self, config, share, plan, start_step):
        self.config, self.share, self.plan, self.start_step = config, share, plan, start_step

    def __iter__(self):
        share, plan = self.share, self.plan
        for step in range(self.start_step, plan.total_steps):
            epoch, i = divmod(step, plan.steps_per_epoch)
            for m in range(plan.accumulation):
                first = i * plan.global_batch + (m * share.world_size + share.rank) * share.micro_batch
                rows = [sample(self.config.seed, epoch, p) for p in range(first, first + share.micro_batch)]
                names = tuple(f"{epoch}/{p}" for p in range(first, first + share.micro_batch))
                yield step, torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), names


class ToyTask:
    unit = "rows"
    counter = "samples"
    units_per_sample = 1
    forward_flops_per_sample = 1000
    val_names = ("loss", "loss_norm")
    best_by = "loss_norm"

    def __init__(self, config):
        self.config = config
        width = config.model.width
        self.model = nn.Sequential(
            nn.Linear(3, width), nn.GELU(), nn.Dropout(config.model.dropout), nn.Linear(width, 1)
        )
        if config.model.max_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (config.model.max_file, resource.RLIM_INFINITY))
        self.samples_per_epoch = config.samples
        self.val_samples = 7
        self.step = 0

    def budget(self, steps_per_epoch):
        return self.config.schedule.budget(steps_per_epoch)

    def startup_lines(self):
        return {"model": "toy"}

    def summary_fields(self):
        parameters = list(self.model.parameters())
        held_as = sorted({type(parameter).__name__ for parameter in parameters})
        return {"parameters": {"total": sum(p.numel() for p in parameters)}, "held_as": held_as}

    def no_weight_decay(self):
        return {"3.weight"}

    def example_batch(self, count):
        return -1, torch.zeros(count, 3), torch.zeros(count, 1), ()

    def train_batches(self, share, plan, start_step):
        return DataLoader(Batches(self.config, share, plan, start_step), batch_size=None)

    def val_batches(self, share):
        for row in [sample(-1, 0, p) for p in range(7)][share.rank :: share.world_size]:
            torch.rand(1)  # a careless validation must not touch the training's numbers
            if 0 <= self.config.model.stop_in_val <= self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield 0, row[0][None], row[1][None], ()

    def sample_names(self, batch):
        return list(batch[3])

    def loss(self, model, batch):
        step, x, y, _ = batch
        if step >= 0:  # no example
            self.step = step + 1
            time.sleep(self.config.model.step_s)
        if step == self.config.model.stop_at and step >= 0:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (model(x) - y).square().mean()
        trouble = self.config.model
        mine = trouble.nan_on in (-1, int(os.environ.get("RANK", "0")))
        if mine and trouble.nan_at >= 0 and trouble.nan_at <= step < trouble.nan_at + trouble.nan_for:
            return NOT_FINITE[trouble.nan_in](loss, self.model[3].bias)
        return loss * 100 if step == trouble.high_at >= 0 else loss

    def val_losses(self, model, batch):
        _, x, y, _ = batch
        error = (model(x) - y).square().mean(dim=1)
        return {"loss": error, "loss_norm": error / 2}

    def write_diagnostics(self, model, folder, step):
        (folder / "reconstructions").mkdir(exist_ok=True)
        (folder / "reconstructions" / f"{step}.txt").write_text(f"{model.training}")

    def export(self, model, folder):
        (folder / "weights.txt").write_text(str([p.tolist() for p in model.parameters()]))


def kill_in(place, call):
    """Have this process killed in the middle of a call of a function: a file that it writes is left half done."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = sys.modules[__name__] if module == "toy" else importlib.import_module(f"moa_train.{module}")
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), itertools.count(1)

    def killed(*args, **kwargs):
        if next(calls) != call:
            return function(*args, **kwargs)
        for file in (argument for argument in args if isinstance(argument, Path)):
            if not file.is_dir():
                file.write_bytes(b"half of ")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killed)


def main(arguments):
    config = parse_config(ToyConfig, arguments, program="toy", summary="A toy.")
    if config.model.kill_in:
        kill_in(config.model.kill_in, config.model.kill_call)
    return run(config, lambda: ToyTask(config), mutable_keys=RESUME_MUTABLE_KEYS | TROUBLE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
