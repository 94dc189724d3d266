"""Two processes, the model whole or in shards, take the steps of one; a run has as many as were asked for."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moa_train.distributed import OURS, blocks, full, local, place_like, total_norm
from moa_train.muon import StackedMuon
from moa_train.signals import EXIT_STOPPED

CONFIGS = Path(__file__).parents[2] / "configs/accelerate"
PLAIN = {"model__dropout": 0.0, "schedule__epochs": 4, "loop__micro_batch_size": 4}
CLIPPED = {**PLAIN, "loop__micro_batch_size": 1, "optim__max_grad_norm": 0.3}
WAYS = {"ddp": False, "fsdp": True}
FAULTS = {"loss": {}, "gradient": {"model__nan_in": "gradient"}}
FAULTY = {**PLAIN, "model__nan_at": 7, "model__nan_on": 1}  # the shard with that bias is another rank's


@pytest.fixture(scope="module")
def launched(tmp_path_factory, two_processes, make_runs):
    """All that two processes do here: folder, and what was printed."""
    runs = make_runs(tmp_path_factory.mktemp("parallel"))

    def job(name, fsdp, code=0, **changed):
        return {
            "main": str(runs.script),
            "arguments": runs.arguments(name, **changed),
            "fsdp": fsdp,
            "code": code,
        }

    moves = {**PLAIN, "schedule__epochs": 4}
    assert runs("moved", **moves, model__stop_at=4) == EXIT_STOPPED
    result = two_processes(
        [
            *(job(way, fsdp, **PLAIN) for way, fsdp in WAYS.items()),
            *(job(f"{way}_clipped", fsdp, **CLIPPED) for way, fsdp in WAYS.items()),
            job("moved", False, EXIT_STOPPED, **moves, model__stop_at=9),
            job("moved", True, EXIT_STOPPED, **moves, model__stop_at=14),
            *(
                job(f"{way}_{fault}_skipped", fsdp, **FAULTY, **where, loop__max_nonfinite_steps=1)
                for way, fsdp in WAYS.items()
                for fault, where in FAULTS.items()
            ),
            *(
                job(f"{way}_{fault}", fsdp, 1, **FAULTY, **where)
                for way, fsdp in WAYS.items()
                for fault, where in FAULTS.items()
            ),
            job("refused", True, 2, **{**PLAIN, "loop__micro_batch_size": 3}),
        ],
        runs.out,
    )
    assert runs("moved", **moves) == 0
    assert runs("one", **PLAIN) == 0
    assert runs("one_clipped", **CLIPPED) == 0
    assert runs("one_skipped", **PLAIN, model__nan_at=7, loop__max_nonfinite_steps=1) == 0
    return runs, result


def assert_same_rows(runs, name, other):
    one, two = runs.rows(name), runs.rows(other)
    assert [(row["kind"], row["step"], row["samples"]) for row in two] == [
        (row["kind"], row["step"], row["samples"]) for row in one
    ]
    for key in ("loss", "loss_norm", "lr", "grad_norm"):
        assert [r.get(key, 0) for r in two] == pytest.approx([r.get(key, 0) for r in one], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "_clipped"], ids=["plain", "accumulated-and-clipped"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_take_the_steps_of_one(launched, way, kind):
    runs, _ = launched
    assert len(runs.rows(f"one{kind}", "train")) == 20
    assert_same_rows(runs, f"one{kind}", f"{way}{kind}")
    seen = runs.json(f"{way}{kind}", "spread.json")
    where = "shard" if WAYS[way] else "whole"
    assert (seen["world_size"], seen["parameters"], seen["optimizer"]) == (2, [where], [where])
    assert seen["timeout_s"] >= 3600, "one process may fetch all shards first, while the others wait"
    assert (seen["model"] == "DistributedDataParallel") is not WAYS[way]
    assert seen["held"] < seen["all"] if WAYS[way] else seen["held"] == seen["all"]


@pytest.mark.slow
def test_a_checkpoint_moves_from_one_process_to_ddp_to_shards_and_back(launched):
    runs, _ = launched
    assert_same_rows(runs, "one", "moved")
    one, moved = runs.final("one"), runs.final("moved")
    names = {key for key in one if key[0] != "generators.safetensors"}
    assert names == {key for key in moved if key[0] != "generators.safetensors"}


def assert_together(runs, name, fault, **expected):
    """Both ranks have the same steps behind them and the same weights; rank 1 alone had one that was not finite."""
    one, other = runs.json(name, "spread.json")["ranks"]
    assert one == other and {key: one[key] for key in expected} == expected
    lines = map(json.loads, (runs.out / name / "events.jsonl").read_text().splitlines())
    (event,) = [line for line in lines if line["kind"] == "nonfinite"]
    finite = [(part["rank"], part["loss"] is not None) for part in event["micro_batches"]]
    assert event["step"] == 8 and event["grad_norm"] is None
    assert finite == [(0, True), (1, fault != "loss")] and (event["loss"] is not None) is (fault != "loss")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_both(launched, way, fault):
    runs, _ = launched
    assert_together(runs, f"{way}_{fault}_skipped", fault, steps=20, skipped=1)
    assert len(runs.rows("one_skipped", "train")) == 19
    assert_same_rows(runs, "one_skipped", f"{way}_{fault}_skipped")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_on_one_rank_stops_both_before_it(launched, way, fault):
    runs, _ = launched
    name = f"{way}_{fault}"
    assert_together(runs, name, fault, steps=7, skipped=0)
    assert (runs.out / name / "checkpoints/LAST").read_text() == "step_00000007\n"
    assert runs(name, **PLAIN) == 0, "the cause has gone"
    assert_same_rows(runs, "one", name)


@pytest.mark.slow
def test_the_files_are_those_of_one_process_and_none_is_a_pickle(launched):
    runs, _ = launched
    trees = [
        {str(path.relative_to(runs.out / name)) for path in (runs.out / name).rglob("*") if path.is_file()}
        for name in ("one", "fsdp")
    ]
    assert trees[1] - trees[0] == {"spread.json"} and not trees[0] - trees[1]
    suffixes = {Path(name).suffix for name in trees[0]}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".txt", ".lock", ""}
    exported = [(runs.out / name / "export/weights.txt").read_text() for name in ("one", "fsdp")]
    numbers = [torch.tensor(list(flat(yaml.safe_load(text)))) for text in exported]
    torch.testing.assert_close(*numbers)


def flat(nested):
    return itertools.chain.from_iterable(map(flat, nested)) if isinstance(nested, list) else [nested]


@pytest.mark.slow
def test_an_impossible_split_is_refused_with_the_nearest_that_work(launched):
    runs, result = launched
    assert "must be a multiple of 6 (2 processes x loop.micro_batch_size 3): the nearest are 6 and 12" in result.stderr
    assert "or keep it with loop.micro_batch_size 2" in result.stderr and not (runs.out / "refused").exists()


NOBODY = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NOBODY += ("SLURM_NTASKS", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", *OURS)


@pytest.mark.parametrize(
    ("environment", "processes", "told"),
    [
        ({}, 2, "loop.world_size asks for 2 processes, but there is 1"),
        ({"WORLD_SIZE": "2"}, None, "WORLD_SIZE asks for 2 processes, but there is 1"),
        ({"WORLD_SIZE": "2"}, 1, "WORLD_SIZE asks for 2"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None, "OMPI_COMM_WORLD_SIZE asks for 4"),
        ({"SLURM_NTASKS": "8"}, None, "or say --loop.world_size 1"),
        (
            {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"},
            None,
            "started one, as it does for MULTI_CPU",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None, "fsdp_version is 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "ACCELERATE_USE_DEEPSPEED"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, None, "FSDP_OFFLOAD_PARAMS"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, None, "it must be 1 or unset: set schedule.batch_size"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, None, "it must be no or unset: use --loop.compile true"),
        ({}, 0, "loop.world_size is 0; it must be 1 or above, or null"),
    ],
    ids=[
        "key",
        "torchrun",
        "both",
        "mpi",
        "slurm",
        "multi-cpu",
        "fsdp1",
        "deepspeed",
        "offload",
        "steps",
        "dynamo",
        "zero",
    ],
)
def test_other_processes_than_asked_for_are_refused_before_anything_is_built(
    runs, environment, processes, told, monkeypatch, capsys
):
    for name in NOBODY:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs.toy.ToyTask, "__init__", lambda task, config: pytest.fail("the task was built"))
    given = {} if processes is None else {"loop__world_size": processes}
    try:
        code = runs("run", **given)
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and told in capsys.readouterr().err and not (runs.out / "run").exists()


def test_what_accelerates_launcher_always_sets_is_taken(runs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    for value in ("NO", "no"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", value)
        assert runs(value) == 0


def test_what_slurm_says_of_the_job_gives_way(runs, monkeypatch):
    """To loop.world_size, and to the number of tasks of the step."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert runs("stated", loop__world_size=1) == 0
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert runs("step") == 0


EXPECTED = {
    "single_gpu": ("NO", 1, 1),
    "gpus_8": ("MULTI_GPU", 1, 8),
    "nodes_2x8": ("MULTI_GPU", 2, 16),
    "fsdp2": ("FSDP", 1, 8),
    "cpu_2": ("MULTI_GPU", 1, 2),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_file(path):
    config = load_config_from_file(str(path))
    found = (config.distributed_type.value, config.num_machines, config.num_processes)
    assert found == EXPECTED[path.stem] and config.mixed_precision == "no" and not config.use_cpu
    assert (config.fsdp_config.get("fsdp_version") == 2) is (path.stem == "fsdp2")
    header = path.read_text().partition("\ncompute_environment")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--config_file configs/accelerate/{path.name}" in header and "# Use it:" in header


def test_there_is_a_file_for_each_kind_of_machine():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.slow
def test_the_file_for_shards_on_a_machine_without_gpus(runs):
    """As its header says; accelerate itself would start two processes that know nothing of each other."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = f"accelerate.commands.launch --config_file {CONFIGS}/fsdp2.yaml --num_processes 2"
    command = [sys.executable, "-m", *launch.split(), str(runs.script), *runs.arguments("two", **PLAIN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert runs.json("two", "env.json")["world_size"] == 2 and runs.json("two", "env.json")["device"] == "cpu"
    assert runs.json("two", "summary.json")["held_as"] == ["DTensor"]
    assert done.stdout.count("finished    20 steps") == 1, done.stdout
    assert runs("one", **PLAIN) == 0
    assert runs.json("one", "summary.json")["held_as"] == ["Parameter"]
    assert_same_rows(runs, "one", "two")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])})
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))


def test_blocks_are_the_items_of_outermost_lists_of_alike_modules():
    model = Nested()
    assert blocks(model) == [*model.body["layers"].children(), *model.decoder]
    assert blocks(nn.Sequential(nn.Linear(2, 2))) == [], "the model itself is no list in it"


def test_without_shards_tensors_stay_what_they_are():
    tensor = torch.randn(3, 4)
    assert full(tensor) is tensor and local(tensor) is tensor and place_like(torch.empty(3, 4), tensor) is tensor


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_norm_is_that_of_all_numbers(values):
    expected = math.sqrt(sum(value * value for row in values for value in row))
    found = float(total_norm([torch.tensor(row) for row in values]))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-15)  # far below that, squares are 0 in float32


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 1)], ids=str)
def test_a_matrix_is_stepped_as_torchs_muon_steps_it(shape):
    torch.manual_seed(0)
    weight, gradient = 0.1 * torch.randn(shape), torch.randn(shape)
    steps = []
    for kind in (StackedMuon, torch.optim.Muon):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = gradient.clone()
        kind([parameter], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
        steps.append(parameter.detach() - weight)
    assert (steps[0] - steps[1]).norm() < 1e-2 * steps[1].norm()  # the rounding of bfloat16
