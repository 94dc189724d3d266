"""A tiny regression task with dropout, epochs and a loader that draws from the global generator; also a script.

Faults are injected by config keys (`model.nan_at`, `model.kill_in`, ...) or on one rank by the environment variables
TROUBLE and RANK_IN_TROUBLE.
"""

import importlib
import itertools
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from moa_train import atomic_io
from moa_train.config import RESUME_MUTABLE_KEYS, EpochSchedule, RunConfig, parse_config
from moa_train.errors import DataError
from moa_train.task import Task
from moa_train.trainer import run

TROUBLE_STEP = 3


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    """The toy.

    Args:
        width: Hidden width.
        dropout: Dropout rate.
        nan_at: Step (from 0) with a non-finite loss; -1 disables it.
        nan_for: Number of such steps.
        nan_in: Where: "loss" or "gradient".
        nan_on: Rank of the fault; -1 is all.
        stop_at: Step that receives SIGTERM; -1 disables it.
        stop_in_val: First step whose validation receives SIGTERM; -1 disables it.
        step_s: Seconds added to a step.
        max_file: Maximum file size in bytes, like a full disk; 0 disables it.
        kill_in: "MODULE:FUNCTION" of moa_train or of this file in which the process is killed.
        kill_call: Number of the killed call, from 1.
    """

    width: int = 8
    dropout: float = 0.2
    nan_at: int = -1
    nan_for: int = 1
    nan_in: str = "loss"
    nan_on: int = -1
    stop_at: int = -1
    stop_in_val: int = -1
    step_s: float = 0.0
    max_file: int = 0
    kill_in: str = ""
    kill_call: int = 1


FAULT_KEYS = {f"model.{key.name}" for key in fields(ToyModel)} - {"model.width", "model.dropout"}

NOT_FINITE = {
    "loss": lambda loss, bias: loss * math.nan,
    "gradient": lambda loss, bias: loss + (0 * bias).abs().sum().sqrt(),
}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """A toy run.

    Args:
        model: The model.
        schedule: Length.
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


class ToyTask(Task):
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
        if in_trouble("SIGUSR1 in build"):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1000)

    def budget(self, steps_per_epoch):
        return self.config.schedule.budget(steps_per_epoch)

    def startup_lines(self):
        return {"model": "toy"}

    def summary_fields(self):
        parameters = list(self.model.parameters())
        types = sorted({type(parameter).__name__ for parameter in parameters})
        return {"parameters": {"total": sum(p.numel() for p in parameters)}, "parameter_types": types}

    def no_weight_decay(self):
        return {"3.weight"}

    def example_batch(self, count):
        return -1, torch.zeros(count, 3), torch.zeros(count, 1), ()

    def train_batches(self, share, plan, start_step):
        return DataLoader(Batches(self.config, share, plan, start_step), batch_size=None)

    def val_batches(self, share):
        for row in [sample(-1, 0, p) for p in range(7)][share.rank :: share.world_size]:
            torch.rand(1)  # a validation that draws from the global generator
            if 0 <= self.config.model.stop_in_val <= self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            if in_trouble("SIGUSR1 in validation"):
                os.kill(os.getpid(), signal.SIGUSR1)
            yield 0, row[0][None], row[1][None], ()

    def sample_names(self, batch):
        return list(batch[3])

    def loss(self, model, batch):
        step, x, y, _ = batch
        faults = self.config.model
        if step >= 0:  # no example
            self.step = step + 1
            time.sleep(faults.step_s)
        if step == TROUBLE_STEP:
            cause_trouble()
        if step == faults.stop_at and step >= 0:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (model(x) - y).square().mean()
        here = faults.nan_on in (-1, int(os.environ.get("RANK", "0")))
        if here and faults.nan_at >= 0 and faults.nan_at <= step < faults.nan_at + faults.nan_for:
            return NOT_FINITE[faults.nan_in](loss, self.model[3].bias)
        return loss

    def val_losses(self, model, batch):
        _, x, y, _ = batch
        error = (model(x) - y).square().mean(dim=1)
        return {"loss": error, "loss_norm": error / 2}

    def write_diagnostics(self, model, folder, step):
        (folder / "reconstructions").mkdir(exist_ok=True)
        (folder / "reconstructions" / f"{step}.txt").write_text(f"{model.training}")

    def export(self, model, folder):
        (folder / "weights.txt").write_text(str([p.tolist() for p in model.parameters()]))


def in_trouble(kind):
    mine = os.environ.get("RANK", "0") == os.environ.get("RANK_IN_TROUBLE", "0")
    return mine and os.environ.get("TROUBLE") == kind


def cause_trouble():
    if in_trouble("bug"):
        raise RuntimeError("a bug in the loss")
    if in_trouble("data"):
        raise DataError("sample 17 cannot be read")
    for name in ("SIGTERM", "SIGUSR1", "SIGKILL"):
        if in_trouble(name):
            os.kill(os.getpid(), getattr(signal, name))
    if in_trouble("launcher killed"):
        os.kill(os.getppid(), signal.SIGKILL)


def prepare_trouble():
    """Send signals from inside of the trainer's own code."""
    if in_trouble("SIGUSR1 in compile"):
        from torch._dynamo.callback import on_compile_start

        on_compile_start(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    if in_trouble("SIGUSR1 in a checkpoint"):
        sync = atomic_io.sync_file
        atomic_io.sync_file = lambda path: (os.kill(os.getpid(), signal.SIGUSR1), sync(path))


def kill_in(place, call):
    """Kill this process in the middle of a call of a function; a file that it writes is left half written."""
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
    prepare_trouble()
    return run(config, lambda: ToyTask(config), mutable_keys=RESUME_MUTABLE_KEYS | FAULT_KEYS)


def forked(environment, arguments, stdout, stderr):
    """Run as a process that a launcher would have started, in a fork of one that has imported this module."""
    os.environ.update(environment)
    if environment["TROUBLE"] == "launcher killed":
        if run := os.fork():  # this process is the launcher
            Path(f"{stdout}.pid").write_text(f"{run}")
            os.waitpid(run, 0)
        os.environ["ACCELERATE_DYNAMO_MODE"] = "default"
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    sys.exit(main(arguments))


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(main)(sys.argv[1:]))
