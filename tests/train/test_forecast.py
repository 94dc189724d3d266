"""Plans for devices that are not there: against real tensors, real checkpoints, real runs, and plain enumeration."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moa_train import checkpoint
from moa_train.config import CheckpointConfig, EpochSchedule, LoopConfig, OptimConfig, RunConfig
from moa_train.data_order import StepBatches
from moa_train.devices import GPUS, Gpu, SavedBytes, find_gpu, saved_bytes_per_sample, trace_saved_bytes
from moa_train.forecast import (
    GIB,
    USABLE_MEMORY,
    Cluster,
    Reading,
    States,
    Workload,
    aligned,
    assumed_rate,
    count_states,
    describe_forecast,
    describe_workload,
    forecast,
    markdown,
    measured_rate,
    muon_flops,
    table,
)
from moa_train.muon import StackedMuon, orthogonalize_flops
from moa_train.optim import build_optimizer
from moa_train.schedule import Budget, make_plan

H200 = find_gpu("h200")


def workload(**changed):
    """112 million parameters, a quarter of them outside of twelve blocks; the numbers are round on purpose."""
    given = {
        "title": "a model",
        "parameters": {"total": 112_000_000},
        "unit": "img",
        "units_per_sample": 1,
        "samples_per_epoch": 1_281_167,
        "budget": EpochSchedule(epochs=800, warmup_epochs=40, batch_size=4096).budget,
        "flops_per_sample": 60_000_000_000,
        "states": States(
            weights=448_000_000, gradients=448_000_000, moments=896_000_000, block=28_000_000, root=112_000_000
        ),
        "saved": SavedBytes(fixed=2**28, per_sample=2**26),
        "reading": Reading(stored_bytes=110_000, core_s=1 / 318, workers=12),
    }
    return Workload(**{**given, **changed})


def config(batch=4096, micro=256, checkpoint=None, **loop):
    return RunConfig(
        schedule=EpochSchedule(epochs=800, warmup_epochs=40, batch_size=batch),
        loop=LoopConfig(micro_batch_size=micro, **loop),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
    )


def cluster(gpu=H200, flops=400e12, **changed):
    return Cluster(gpu=gpu, flops=flops, flops_source="400 TFLOP/s", **changed)


def test_every_device_of_the_table_has_a_peak():
    for gpu in GPUS:
        assert find_gpu(gpu.name) == find_gpu(gpu.name.lower().replace(" ", "-")) == gpu
        assert (gpu.peak_flops is None) == (gpu.name == "cpu")
    with pytest.raises(ValueError, match=r"gpu is 'h300'; it must be one of b200, h200, .*a100-80gb"):
        find_gpu("h300")


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
def test_what_is_saved_is_what_real_tensors_save(bf16):
    with torch.device("meta"):
        planned = Small()
    traced = trace_saved_bytes(planned, lambda n: planned(torch.zeros(n, 7, 24)), bf16=bf16)
    real = Small()

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return real(x)

    assert traced.per_sample == saved_bytes_per_sample(real, loss, lambda n: torch.zeros(n, 7, 24)) > 0
    matrices = 2 * (6 * 24 * 40 + 24 * 5)  # autocast keeps their bf16 copies, which backward multiplies with
    assert matrices * bf16 <= traced.fixed <= matrices * bf16 + 64  # and some scalars
    assert all(parameter.is_meta for parameter in planned.parameters())


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_states_are_those_of_a_real_checkpoint(algorithm, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(300, 700), "second": nn.Linear(700, 300), "head": nn.Linear(300, 3)})
    hidden = ["first.weight", "second.weight"]
    by_muon = hidden if algorithm == "muon" else []
    optimizer = build_optimizer(model, OptimConfig(algorithm=algorithm), set(), hidden)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = checkpoint.snapshot(model, optimizer, {"0.cpu": torch.get_rng_state()})
    path = checkpoint.save(tmp_path, {"step": 1}, tensors, keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    states = count_states(model, by_muon)
    assert states.weights + states.moments == pytest.approx(written, rel=0.01)
    assert states.gradients == sum(p.grad.nbytes for p in model.parameters())


def test_blocks_and_what_lies_outside():
    model = Small()
    states = count_states(model)
    blocks = [*model.blocks, *model.back]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    assert states.block == max(sizes) and states.root == states.weights - sum(sizes)


def test_blocks_are_those_that_are_gathered():
    """A list within a block is a part of it, and a sequence of different modules is no list of blocks."""
    blocks = nn.ModuleList(nn.ModuleDict({"parts": nn.ModuleList(nn.Linear(5, 5) for _ in range(n))}) for n in (4, 2))
    head = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.LayerNorm(30))
    states = count_states(nn.ModuleDict({"blocks": blocks, "head": head}))
    assert states.block == 4 * 4 * (25 + 5) and states.root == 4 * (50 * 30 + 30 + 2 * 30)
    assert states.weights == states.root + 6 * 4 * (25 + 5)


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 600), gpus=st.integers(1, 700), micro=st.integers(1, 64), gib=st.floats(0.5, 40), fsdp=...)
def test_a_split_is_the_largest_that_works(batch, gpus, micro, gib, fsdp: bool):
    parallel = "fsdp2" if fsdp else "ddp"
    where = cluster(Gpu("H200", gib, 450), parallel=parallel)
    found = forecast(config(batch, micro), workload(), where, gpus)
    plan = found.plan
    assert plan.accumulation * plan.world_size * plan.micro_batch == batch
    assert plan.world_size == max(n for n in range(1, gpus + 1) if batch % n == 0)
    assert found.memory.limit == int(USABLE_MEMORY * gib * GIB)
    wider = [m for m in range(plan.micro_batch + 1, micro + 1) if batch % (m * plan.world_size) == 0]
    for larger in wider:  # none of them fits: with all the memory of the world they are taken
        roomy = forecast(config(batch, larger), workload(), replace(where, gpu=Gpu("H200", 10_000, 450)), gpus)
        assert roomy.plan.micro_batch == larger and roomy.memory.total > found.memory.limit
    assert bool(found.notes) == (plan.world_size < gpus or plan.micro_batch < micro or not found.memory.fits)
    assert found.plan.total_steps == 800 * (1_281_167 // batch)  # whatever the devices


def test_the_full_recipe_in_closed_form():
    found = forecast(config(checkpoint={"interval": 624, "keep_latest": 3}), workload(), cluster(), 8)
    plan = found.plan
    assert (plan.total_steps, plan.accumulation, plan.micro_batch) == (249_600, 2, 256)
    assert found.compute_s == pytest.approx(4096 * 60e9 / (8 * 400e12))
    assert found.communication_s == pytest.approx(2 * 7 / 8 * 448e6 / 450e9)  # a ring all-reduce over NVLink
    assert found.exposed_s == 0.0 and found.hours == pytest.approx(249_600 * found.compute_s / 3600)
    assert found.memory.total == 448_000_000 * 5 + 2**28 + 256 * 2**26  # states, DDP's buckets, activations
    assert found.cores == pytest.approx(4096 / found.compute_s / 318)
    assert found.shard_bytes_per_s == pytest.approx(4096 / found.compute_s * 110_000)
    assert found.loader_hours == pytest.approx(249_600 * 4096 / 318 / 96 / 3600)
    assert (found.saves, found.kept, found.checkpoint_bytes) == (800, 3, 448_000_000 * 3)
    assert found.write_s == pytest.approx(1.344)


def test_between_nodes_the_network_is_what_counts():
    near, far = (forecast(config(), workload(), cluster(network_gb_s=10.0), gpus) for gpus in (8, 16))
    assert far.communication_s == pytest.approx(2 * 15 / 16 * 448e6 / 10e9)
    assert near.exposed_s == 0.0
    assert far.exposed_s == pytest.approx(far.communication_s - 2 / 3 * far.compute_s)
    assert far.step_s == pytest.approx(far.compute_s + far.exposed_s)


def test_sharding_spares_states_and_moves_more():
    whole, sharded = (forecast(config(), workload(), cluster(parallel=p), 16) for p in ("ddp", "fsdp2"))
    assert sharded.memory.weights == 448_000_000 / 16 and sharded.memory.moments == 896_000_000 / 16
    assert sharded.memory.activations == whole.memory.activations
    assert sharded.memory.communication == 2 * (112_000_000 + 2 * 28_000_000)
    assert sharded.communication_s == pytest.approx(1.5 * whole.communication_s)  # two gathers and one reduction
    accumulating = forecast(config(micro=64), workload(), cluster(parallel="fsdp2"), 16)
    assert accumulating.memory.communication == sharded.memory.communication + 448_000_000
    alone = forecast(config(), workload(), cluster(parallel="fsdp2"), 1)
    assert alone.memory.communication == alone.communication_s == 0


STACK, MATRIX = (32, 512, 1024), (1024, 1024)


def test_muon_in_closed_form():
    """Its work does not shrink with DDP's devices, and no links hide behind it."""
    of_stack, of_matrix = 32 * 5 * 2 * 512**2 * (2 * 1024 + 512), 5 * 2 * 3 * 1024**3
    by_muon = workload(muon=(STACK, STACK, MATRIX))
    for gpus in (1, 8, 64):
        whole, without = (forecast(config(), asked, cluster(), gpus) for asked in (by_muon, workload()))
        assert whole.muon_s == pytest.approx((2 * of_stack + of_matrix) / 400e12) and without.muon_s == 0
        assert whole.step_s == pytest.approx(without.step_s + whole.muon_s)
        assert whole.hours == pytest.approx(249_600 * whole.step_s / 3600)
        assert (whole.compute_s, whole.exposed_s) == (without.compute_s, without.exposed_s)
    for gpus, experts in ((1, 32), (8, 4), (16, 2), (64, 1), (1024, 1)):
        sharded = forecast(config(), by_muon, cluster(parallel="fsdp2"), gpus)
        assert sharded.muon_s == pytest.approx((2 * of_stack * experts / 32 + of_matrix) / 400e12)


@settings(deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=3), max_size=4), devices=st.integers(1, 50))
def test_muon_shares_stacks_as_torch_splits_them(shapes, devices):
    everything = sum(map(orthogonalize_flops, shapes))
    assert muon_flops(shapes, devices, "ddp") == muon_flops(shapes, 1, "fsdp2") == everything
    parts = [torch.empty(shape, device="meta").chunk(devices) if len(shape) == 3 else None for shape in shapes]
    first = sum(
        orthogonalize_flops(shape if part is None else part[0].shape) for shape, part in zip(shapes, parts, strict=True)
    )
    assert muon_flops(shapes, devices, "fsdp2") == first <= everything <= devices * first


def test_muons_work_is_that_of_a_real_step():
    shapes = [(4, 12, 20), (4, 20, 12), (16, 8), (16, 16)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        StackedMuon(parameters).step()
    assert muon_flops(shapes, 1, "ddp") == counter.get_total_flops()


def test_at_the_start_weights_are_whole_even_where_they_will_be_sharded():
    large = States(weights=2**36, gradients=2**36, moments=2**37, block=2**28, root=2**28)
    many = workload(states=large, saved=SavedBytes(0, 2**20))
    found = forecast(config(micro=16), many, cluster(parallel="fsdp2"), 256)
    assert found.memory.training < 2**32 < found.memory.start == 2**36 + 2**21 == found.memory.total
    assert found.memory.fits
    text = describe_forecast(found, many, cluster(parallel="fsdp2"))["memory"]
    assert text.startswith("about 64.00 GiB a device, fits 90% of 141 GiB: at the start, before anything is sharded;")
    small = forecast(config(micro=16), many, cluster(find_gpu("a100-40gb"), parallel="fsdp2"), 256)
    assert not small.memory.fits and "larger GPUs" in small.notes[-1]


def test_memory_that_is_too_small_is_told():
    found = forecast(config(), workload(), cluster(find_gpu("l4")), 8)
    assert found.memory.fits and found.plan.micro_batch == 256
    tight = forecast(config(), workload(saved=SavedBytes(0, 2**28)), cluster(find_gpu("l4")), 8)
    assert tight.plan.micro_batch == 64 and tight.plan.accumulation == 8
    assert tight.notes == ("a micro-batch of 256 does not fit the memory: --loop.micro_batch_size 64 fits",)
    hopeless = forecast(config(), workload(saved=SavedBytes(2**36, 0)), cluster(find_gpu("l4")), 8)
    assert not hopeless.memory.fits and hopeless.plan.micro_batch == 1
    assert "does not fit either" in hopeless.notes[0] and "fsdp2" in hopeless.notes[1]
    assert "does not fit" in table([hopeless])[1][2]
    assert "does NOT fit" in describe_forecast(hopeless, workload(), cluster(find_gpu("l4")))["memory"]


@pytest.mark.parametrize(("gpus", "field"), [(0, "gpus is 0"), (-3, "gpus is -3")])
def test_no_devices(gpus, field):
    with pytest.raises(ValueError, match=field):
        forecast(config(), workload(), cluster(), gpus)


def test_rates():
    assert assumed_rate(H200, None) == (0.4 * 989e12, "40.0% of the bf16 peak, assumed")
    assert assumed_rate(H200, 0.3) == (0.3 * 989e12, "30.0% of the bf16 peak, given")
    rate, why = assumed_rate(find_gpu("cpu"), None)
    assert rate is None and "no peak rate is known for cpu" in why
    with pytest.raises(ValueError, match=r"utilization is 1.5; it must be above 0"):
        assumed_rate(H200, 1.5)
    unknown = forecast(config(), workload(), cluster(find_gpu("cpu"), flops=None), 4)
    assert unknown.hours is unknown.cores is unknown.communication_s is None and unknown.memory.fits
    assert set(table([unknown])[1]) >= {"–"}
    assert describe_forecast(unknown, workload(), cluster(find_gpu("cpu"), flops=None))["links"] == "not known"


def test_a_real_run_is_foretold(runs):
    """Steps, checkpoints and, from its own recorded speed, its length."""
    assert runs("run", checkpoint__interval=2, checkpoint__keep_latest=2, checkpoint__keep_interval=6) == 0
    toy = runs.toy
    own = toy.parse_config(
        toy.ToyConfig,
        runs.arguments("run", checkpoint__interval=2, checkpoint__keep_latest=2, checkpoint__keep_interval=6),
        program="toy",
        summary="",
    )
    task = toy.ToyTask(own)
    asked = workload(
        samples_per_epoch=task.samples_per_epoch,
        budget=task.budget,
        flops_per_sample=3 * task.forward_flops_per_sample,
        states=count_states(task.model),
    )
    rate, why = measured_rate(runs.out / "run", find_gpu("cpu"))
    found = forecast(own, asked, cluster(find_gpu("cpu"), flops=rate), 1)
    summary = runs.json("run", "summary.json")
    assert found.plan.total_steps == summary["steps"] == 15
    assert found.kept == len([*(runs.out / "run" / "checkpoints").glob("step_*")]) == 4
    assert found.hours * 3600 == pytest.approx(summary["samples"] / summary["throughput"])
    assert found.samples_per_s == pytest.approx(summary["throughput"]) and "as " in why
    with pytest.raises(ValueError, match=r"which ran on cpu; the peak of that or of H200 is not known"):
        measured_rate(runs.out / "run", H200)


def recorded(folder, **changed):
    facts = {"throughput": 1000.0, "flops_per_token": 1e9, "world_size": 8, "device": "NVIDIA H100 PCIe"}
    facts |= {"status": "finished", **changed}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder / "env.json").write_text(json.dumps(facts))
    return folder


def test_a_measured_part_of_the_peak_holds_for_other_devices(tmp_path):
    rate, why = measured_rate(recorded(tmp_path / "run", throughput=8 * 378e12 / 1e9), H200)
    assert rate == pytest.approx(989e12 / 2) and why.startswith("50.0% of the bf16 peak, as ")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_measured_step_holds_muons_work_once(gpus, parallel, tmp_path):
    """A plan for as many devices comes to the recorded time again, and the rate is the one that holds for others."""
    asked, where = workload(muon=100 * (STACK, MATRIX)), cluster(parallel=parallel)
    real = forecast(config(), asked, where, gpus)
    assert real.exposed_s == 0 and real.muon_s > 0.1 * real.compute_s
    steps = {"steps": 10, "flops_total": 10 * 4096 * asked.flops_per_sample}
    speed = {"throughput": real.samples_per_s, "flops_per_token": asked.flops_per_sample}
    run = recorded(tmp_path / "run", **steps, **speed, world_size=gpus, device="NVIDIA H200")
    rate, why = measured_rate(run, H200, asked.muon, parallel)
    assert rate == pytest.approx(where.flops) and why.startswith("40.4% of the bf16 peak, Muon's work counted, as ")
    again = forecast(config(), asked, replace(where, flops=rate), gpus)
    assert again.hours == pytest.approx(real.hours) and again.muon_s == pytest.approx(real.muon_s)
    assert measured_rate(run, H200)[0] == pytest.approx(4096 * asked.flops_per_sample / gpus / real.step_s)


@pytest.mark.parametrize("changed", [{"steps": 0}, {"flops_total": 0}, {"flops_total": None}, {}])
def test_what_tells_no_speed_with_muon(changed, tmp_path):
    run = recorded(tmp_path / "run", **{"steps": 10, "flops_total": 1e15, **changed} if changed else {})
    with pytest.raises(ValueError, match=r"measured is .*it must be a run folder"):
        measured_rate(run, H200, [MATRIX])


@pytest.mark.parametrize(
    "changed",
    [
        {"throughput": None},
        {"world_size": 0},
        {"device": 3, "throughput": -1},
        {"throughput": 1e308},
        {"throughput": 10**400},
        {"throughput": 1e-320, "flops_per_token": 1e-320},
    ],
    ids=str,
)
def test_what_tells_no_speed(changed, tmp_path):
    with pytest.raises(ValueError, match=r"measured is .*it must be a run folder.* summary.json"):
        measured_rate(recorded(tmp_path / "run", **changed), H200)
    with pytest.raises(ValueError, match=r"measured is .*it must be a run folder"):
        measured_rate(tmp_path / "absent", H200)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{"], ids=["deep", "list", "broken"])
def test_a_damaged_environment_is_named(text, tmp_path):
    run = recorded(tmp_path / "run")
    (run / "env.json").write_text(text)
    with pytest.raises(ValueError, match=r"measured is .*env\.json cannot be read"):
        measured_rate(run, H200)


@pytest.mark.parametrize(("repeats", "size"), [(1, 5), (2, 8), (4, 6), (6, 4), (8, 2), (5, 1), (3, 7)])
def test_what_repeats_share_within_a_micro_batch(repeats, size):
    """Against the micro-batches that training reads, over an epoch."""
    batches = [*StepBatches(6720, 6720, size, 0, 1, range(1))]
    read = sum(len({position // repeats for _, position in batch}) for batch in batches) / 6720
    given = Reading(stored_bytes=100.0, core_s=1.0, workers=2, decode_s=10.0, repeats=repeats)
    found = given.in_batches(size)
    assert (found.stored_bytes, found.core_s) == pytest.approx((100 * read, 1 + 10 * read))
    assert found.in_batches(size) == found
    asked = workload(reading=given, samples_per_epoch=6720, budget=lambda steps: Budget(1, 0))
    assert forecast(config(6720, size), asked, cluster(), 1).reading == found


def test_no_number_of_devices_takes_long(fuzzing):
    huge = 10**11

    def act():
        assert forecast(config(4096), workload(), cluster(), huge).plan.world_size == 4096
        asked = workload(samples_per_epoch=10**9, budget=lambda steps: Budget(1, 0))
        found = forecast(config(10**9, huge), asked, cluster(), huge)
        assert (found.plan.world_size, found.plan.micro_batch) == (10**9, 1)
        with pytest.raises(ValueError, match=r"schedule.batch_size is 999999937; .*nearest"):
            make_plan(config(999_999_937, 2), 10**9, asked.budget, 7)

    assert fuzzing.refusal(act, seconds=10) is None
    for plan in (
        lambda: forecast(config(huge), workload(), cluster(), 1),
        lambda: make_plan(config(huge), 1, max, 1),
    ):
        with pytest.raises(ValueError, match=r"schedule.batch_size is 100000000000; it must be at most 1,000,000,000"):
            plan()


@settings(deadline=None)
@given(
    total=st.integers(1, 60),
    save_every=st.integers(1, 12),
    keep=st.integers(1, 6),
    times=st.none() | st.integers(1, 4),
)
def test_checkpoints_that_are_kept(total, save_every, keep, times):
    every = None if times is None else times * save_every
    asked = workload(samples_per_epoch=8, budget=lambda steps: Budget(total, 0))
    found = forecast(
        config(8, 8, {"interval": save_every, "keep_latest": keep, "keep_interval": every}), asked, cluster(), 1
    )
    there: list[int] = []
    saves = 0
    for step in range(1, total + 1):  # as checkpoint.save drops them
        saves += step != total and step % save_every == save_every // 2 != 0  # half-way: gone with the next
        if step % save_every == 0 or step == total:
            saves += 1
            newest = sorted([*there, step], reverse=True)
            there = newest[:keep] + [s for s in newest[keep:] if every is not None and s % every == 0]
    assert (found.saves, found.kept) == (saves, len(there))


def test_lines_and_tables():
    plans = [forecast(config(), workload(), cluster(), gpus) for gpus in (1, 8, 3000)]
    rows = table(plans)
    assert [row[0] for row in rows] == ["GPUs", "1", "8", "3000 (2048 used)"]
    assert len({len(line) for line in aligned(rows).splitlines()}) == 1
    lines = markdown(rows).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    by_muon = workload(muon=(STACK,))
    for where, shown in ((cluster(), "0.5"), (cluster(find_gpu("cpu"), flops=None), "–")):
        head, row = table([forecast(config(), by_muon, where, 8)])
        assert dict(zip(head, row, strict=True))["Muon, ms"] == shown and "Muon, ms" not in rows[0]
    found = forecast(config(), by_muon, cluster(), 8)
    assert "77.3 ms a step, of which 76.8 compute, 0.5 Muon" in describe_forecast(found, by_muon, cluster())["time"]
    assert describe_workload(by_muon)["work"] == "60 GFLOPs a img in training; 215 GFLOPs a step for Muon"
    text = describe_workload(workload()) | describe_forecast(plans[1], workload(), cluster())
    assert "data.workers 12 make the run last" in text["loader"] and "5 h" in text["time"]
    assert json.loads(json.dumps(plans[1].as_tree()))["hours"] == plans[1].hours
    tree = json.loads(json.dumps(workload().as_tree()))
    assert tree["saved"]["per_sample"] == 2**26 and tree["states"]["weights"] == 448_000_000 and "budget" not in tree
