"""Estimates for target hardware, against real tensors, checkpoints and runs, and closed forms."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moa_train.config import EpochSchedule, LoopConfig, OptimConfig, RunConfig
from moa_train.devices import Gpu, SavedBytes, find_gpu, saved_bytes, trace_saved_bytes
from moa_train.errors import ConfigError
from moa_train.estimate import (
    GIB,
    USABLE_MEMORY,
    ModelStates,
    Target,
    Workload,
    assumed_rate,
    count_states,
    estimate,
    measured_rate,
    memory_bytes,
)
from moa_train.optim import build_optimizer
from moa_train.plan_cli import markdown_table

H200 = find_gpu("h200")
STACK, MATRIX = (32, 512, 1024), (1024, 1024)
WEIGHTS, BLOCK, ROOT = 448_000_000, 28_000_000, 112_000_000


def workload(**changed):
    """112 million parameters, a quarter of them outside of twelve blocks."""
    values = {
        "title": "a model",
        "parameters": {"total": 112_000_000},
        "unit": "img",
        "units_per_sample": 1,
        "samples_per_epoch": 1_281_167,
        "budget": EpochSchedule(epochs=800, warmup_epochs=40, batch_size=4096).budget,
        "flops_per_sample": 60_000_000_000,
        "states": ModelStates(weights=WEIGHTS, gradients=WEIGHTS, moments=2 * WEIGHTS, block=BLOCK, root=ROOT),
        "saved": SavedBytes(fixed=2**28, per_sample=2**26),
        "loader_core_s": lambda micro_batch: 1 / 318,
    }
    return Workload(**{**values, **changed})


def config(batch=4096, micro=256):
    return RunConfig(
        schedule=EpochSchedule(epochs=800, warmup_epochs=40, batch_size=batch), loop=LoopConfig(micro_batch_size=micro)
    )


def target(gpu=H200, **changed):
    return Target(**{"gpu": gpu, "flops": 400e12, "source": "given", **changed})


# Memory


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU()) for _ in range(3))
        self.back = nn.ModuleList(nn.Linear(40, 24) for _ in range(3))
        self.head = nn.Linear(24, 5)
        self.register_buffer("shift", torch.zeros(24))

    def forward(self, x):
        x = x + self.shift
        for block, back in zip(self.blocks, self.back, strict=True):
            x = x + nn.functional.dropout(back(block(x)), 0.1)
        return self.head(x).float().square().mean()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
def test_traced_activations_are_those_of_real_tensors(bf16):
    with torch.device("meta"):
        planned = Small()
    traced = trace_saved_bytes(planned, lambda n: planned(torch.zeros(n, 7, 24)), bf16=bf16)
    real = Small()

    def loss(n):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return real(torch.zeros(n, 7, 24))

    one, two = (saved_bytes(lambda n=n: loss(n), real.parameters()) for n in (1, 2))
    assert traced.per_sample == two - one > 0
    matrices = 2 * (6 * 24 * 40 + 24 * 5)  # bf16 copies that autocast keeps for backward
    assert matrices * bf16 <= traced.fixed <= matrices * bf16 + 64  # and some scalars


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_states_are_those_of_a_real_optimizer(algorithm):
    model = nn.ModuleDict({"first": nn.Linear(30, 70), "second": nn.Linear(70, 30), "head": nn.Linear(30, 3)})
    hidden = ["first.weight", "second.weight"]
    optimizer = build_optimizer(model, OptimConfig(algorithm=algorithm), set(), hidden)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = count_states(model, hidden if algorithm == "muon" else [])
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert states.moments == sum(value.nbytes for value in held if torch.is_tensor(value) and value.ndim)
    assert states.gradients == sum(p.grad.nbytes for p in model.parameters())


def test_blocks_and_root():
    model = Small()
    sizes = [sum(p.nbytes for p in block.parameters()) for block in (*model.blocks, *model.back)]
    states = count_states(model)
    assert (states.block, states.root) == (max(sizes), states.weights - sum(sizes))


def test_memory_in_closed_form():
    activations = 2**28 + 256 * 2**26

    def memory(parallel, devices, accumulated):
        return memory_bytes(workload(), target(parallel=parallel), devices, 256, accumulated=accumulated)

    assert memory("ddp", 1, True) == memory("fsdp2", 1, True) == 4 * WEIGHTS + activations
    assert memory("ddp", 8, True) == 5 * WEIGHTS + activations  # and the buckets of DDP
    assert memory("fsdp2", 16, False) == 4 * WEIGHTS / 16 + 2 * (ROOT + 2 * BLOCK) + activations
    assert memory("fsdp2", 16, True) == memory("fsdp2", 16, False) + WEIGHTS


def test_memory_at_the_start_counts_unsharded_weights():
    states = ModelStates(weights=2**36, gradients=2**36, moments=2**37, block=2**28, root=2**28)
    large = workload(states=states, saved=SavedBytes(0, 2**20))
    assert memory_bytes(large, target(parallel="fsdp2"), 256, 16, accumulated=False) == 2**36


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 600), gpus=st.integers(1, 700), micro=st.integers(1, 64), gib=st.floats(0.5, 40), fsdp=...)
def test_micro_batch_is_the_largest_that_splits_and_fits(batch, gpus, micro, gib, fsdp: bool):
    where = target(Gpu("H200", gib, 989e12), parallel="fsdp2" if fsdp else "ddp")
    found = estimate(config(batch, micro), workload(), where, gpus)
    plan = found.plan
    assert plan.accumulation * plan.world_size * plan.micro_batch == batch
    assert plan.world_size == max(n for n in range(1, gpus + 1) if batch % n == 0)
    assert found.fits == (found.memory <= USABLE_MEMORY * gib * GIB)
    for larger in range(plan.micro_batch + 1, micro + 1):
        if batch % (larger * plan.world_size) == 0:
            huge = replace(where, gpu=Gpu("H200", 10_000, 989e12))
            roomy = estimate(config(batch, larger), workload(), huge, gpus)
            assert roomy.plan.micro_batch == larger and roomy.memory > USABLE_MEMORY * gib * GIB
    assert plan.total_steps == 800 * (1_281_167 // batch)


# Time


def test_full_recipe_in_closed_form():
    found = estimate(config(), workload(), target(), 8)
    assert (found.plan.total_steps, found.plan.accumulation, found.plan.micro_batch) == (249_600, 2, 256)
    assert found.step_s == pytest.approx(4096 * 60e9 / (8 * 400e12))
    assert found.hours == pytest.approx(249_600 * found.step_s / 3600)
    assert found.cores == pytest.approx(4096 / found.step_s / 318)
    assert found.checkpoint_bytes == 3 * WEIGHTS


@pytest.mark.parametrize(("parallel", "gpus", "experts"), [("ddp", 64, 32), ("fsdp2", 8, 4)])
def test_muon_in_closed_form(parallel, gpus, experts):
    where = target(parallel=parallel)
    by_muon, without = (
        estimate(config(), asked, where, gpus) for asked in (workload(muon=(STACK, MATRIX)), workload())
    )
    flops = experts * 5 * 2 * 512**2 * (2 * 1024 + 512) + 5 * 2 * 3 * 1024**3
    assert by_muon.step_s - without.step_s == pytest.approx(flops / 400e12)


# Rates


def test_assumed_rates():
    assert assumed_rate(H200, None) == (0.4 * 989e12, "40.0% of the bf16 peak, assumed")
    assert assumed_rate(H200, 0.3) == (0.3 * 989e12, "30.0% of the bf16 peak, given")
    with pytest.raises(ConfigError, match=r"--utilization is 1.5; it must be above 0"):
        assumed_rate(H200, 1.5)
    with pytest.raises(ConfigError, match="the bf16 peak of cpu is unknown"):
        assumed_rate(find_gpu("cpu"), None)


def test_real_run_is_predicted_from_its_throughput(runs):
    assert runs("run") == 0
    own = runs.toy.parse_config(runs.toy.ToyConfig, runs.arguments("run"), program="toy", summary="")
    task = runs.toy.ToyTask(own)
    asked = workload(
        samples_per_epoch=task.samples_per_epoch,
        budget=task.budget,
        flops_per_sample=3 * task.forward_flops_per_sample,
    )
    rate, source = measured_rate(runs.out / "run", find_gpu("cpu"))
    found = estimate(own, asked, target(find_gpu("cpu"), flops=rate, source=source), 1)
    summary = runs.json("run", "summary.json")
    assert found.plan.total_steps == summary["steps"] == 15
    assert found.hours * 3600 == pytest.approx(summary["samples"] / summary["throughput"])
    with pytest.raises(ConfigError, match=r"ran on cpu; for H200 the bf16 peaks of both must be known"):
        measured_rate(runs.out / "run", H200)


def recorded(folder, **changed):
    facts = {"throughput": 1000.0, "flops_per_token": 1e9, "world_size": 8, "device": "NVIDIA H100 PCIe"}
    facts |= {"status": "finished", **changed}
    folder.mkdir()
    for name in ("summary.json", "env.json"):
        (folder / name).write_text(json.dumps(facts))
    return folder


def test_measured_fraction_of_the_peak_holds_for_other_devices(tmp_path):
    rate, source = measured_rate(recorded(tmp_path / "run", throughput=8 * 378e12 / 1e9), H200)
    assert rate == pytest.approx(989e12 / 2) and source.startswith("50.0% of the bf16 peak, as ")


def test_run_without_a_throughput_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"summary.json has no throughput; take a run with more steps"):
        measured_rate(recorded(tmp_path / "run", throughput=None), H200)
    with pytest.raises(ValueError, match=r"absent/summary.json cannot be read"):
        measured_rate(tmp_path / "absent", H200)


@pytest.mark.parametrize(("parallel", "gpus"), [("ddp", 1), ("fsdp2", 8)])
def test_measured_rate_includes_the_work_of_muon(gpus, parallel, tmp_path):
    asked, where = workload(muon=100 * (STACK, MATRIX)), target(parallel=parallel)
    real = estimate(config(), asked, where, gpus)
    run = recorded(
        tmp_path / "run",
        steps=10,
        flops_total=10 * 4096 * asked.flops_per_sample,
        throughput=real.samples_per_s,
        flops_per_token=asked.flops_per_sample,
        world_size=gpus,
        device="NVIDIA H200",
    )
    assert measured_rate(run, H200, asked.muon, parallel)[0] == pytest.approx(where.flops)


def test_table():
    too_large = estimate(config(), workload(saved=SavedBytes(2**36, 0)), target(find_gpu("l4")), 8)
    assert not too_large.fits and "66.1 GiB, does not fit" in markdown_table([too_large])
    estimates = [estimate(config(), workload(), target(), gpus) for gpus in (1, 8, 3000)]
    head, rule, *rows = markdown_table(estimates).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["1", "8", "3000 (2048 used)"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert math.isclose(float(rows[1].split("|")[5]), estimates[1].hours, abs_tol=0.005)
