"""Steps and batches from epochs; device peaks."""

import re

import pytest

from moa_train.config import EpochSchedule, LoopConfig, OptimConfig, RunConfig
from moa_train.devices import bf16_peak_flops
from moa_train.errors import ConfigError
from moa_train.schedule import make_plan


def config(batch, micro, epochs=1.0, warmup=0.0):
    return RunConfig(
        optim=OptimConfig(lr=1.2e-3),
        schedule=EpochSchedule(epochs=epochs, warmup_epochs=warmup, batch_size=batch),
        loop=LoopConfig(micro_batch_size=micro),
    )


def plan_of(config, samples, world_size):
    return make_plan(config, samples, config.schedule.budget, world_size)


@pytest.mark.parametrize("world_size", [1, 64])
def test_full_recipe(world_size):
    plan = plan_of(config(4096, 64, epochs=800, warmup=40), 1_281_167, world_size)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (312, 249_600, 12_480)  # the official MAE's
    assert plan.accumulation * world_size * 64 == 4096
    assert plan.lr_at(12_480) == 1.2e-3 and plan.lr_at(0) == 0.0
    assert [step for step in range(800) if plan.due(step, 300)] == [300, 600]
    assert plan.due(249_600, 1000)


@pytest.mark.parametrize(("batch", "micro", "world_size"), [(100, 7, 2), (8, 64, 1), (96, 4, 100)])
def test_impossible_split_names_the_nearest_that_work(batch, micro, world_size):
    with pytest.raises(ConfigError, match=rf"schedule.batch_size is {batch}; it must be a multiple") as error:
        plan_of(config(batch, micro), 10_000, world_size)
    batches = re.search(r"the nearest are (?:(\d+) and )?(\d+)", str(error.value)).groups()
    works = [b for b in range(1, 2 * batch + 2 * micro * world_size) if b % (micro * world_size) == 0]
    below = [b for b in works if b < batch]
    assert batches == (str(below[-1]) if below else None, str(next(b for b in works if b > batch)))
    named = re.search(r"loop\.micro_batch_size (?:to )?(\d+)$|loop\.micro_batch_size (\d+),", str(error.value))
    fitting = [m for m in range(1, micro) if batch % (m * world_size) == 0]
    assert (named is not None) == bool(fitting) and (not fitting or str(max(fitting)) in named.groups())


def test_batch_larger_than_the_training_set():
    with pytest.raises(ConfigError, match=r"batch_size is 64; it must be at most .* 63"):
        plan_of(config(64, 64), 63, 1)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H20", None),
    ],
)
def test_peaks(name, tera):
    peak = bf16_peak_flops(name)
    assert peak is None if tera is None else peak == pytest.approx(tera * 1e12)
