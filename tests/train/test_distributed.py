"""DDP and FSDP2 take the steps of one process; launcher settings that conflict with the config are refused."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn

from moa_train.distributed import ACCELERATE_SETTINGS, blocks
from moa_train.signals import EXIT_STOPPED

CONFIGS = Path(__file__).parents[2] / "configs/accelerate"
PLAIN = {"model__dropout": 0.0, "schedule__epochs": 4, "loop__micro_batch_size": 4}
CLIPPED = {**PLAIN, "loop__micro_batch_size": 1, "optim__max_grad_norm": 0.3}
FSDP = {"ddp": False, "fsdp": True}
FAULTS = {"loss": {}, "gradient": {"model__nan_in": "gradient"}}
FAULTY = {**PLAIN, "model__nan_at": 7, "model__nan_on": 1}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, two_processes, make_runs):
    """All runs of two processes in this file."""
    runs = make_runs(tmp_path_factory.mktemp("parallel"))

    def job(name, fsdp, code=0, **changed):
        return {"main": str(runs.script), "arguments": runs.arguments(name, **changed), "fsdp": fsdp, "code": code}

    assert runs("moved", **PLAIN, model__stop_at=4) == EXIT_STOPPED
    jobs = [
        job("moved", False, EXIT_STOPPED, **PLAIN, model__stop_at=9),
        job("moved", True, EXIT_STOPPED, **PLAIN, model__stop_at=14),
    ]
    for kind, fsdp in FSDP.items():
        jobs += [job(kind, fsdp, **PLAIN), job(f"{kind}_clipped", fsdp, **CLIPPED)]
        for fault, where in FAULTS.items():
            jobs.append(job(f"{kind}_{fault}_skipped", fsdp, **FAULTY, **where, loop__max_nonfinite_steps=1))
            jobs.append(job(f"{kind}_{fault}", fsdp, 1, **FAULTY, **where))
    two_processes(jobs, runs.out)
    assert runs("moved", **PLAIN) == 0
    assert runs("one", **PLAIN) == 0
    assert runs("one_clipped", **CLIPPED) == 0
    assert runs("one_skipped", **PLAIN, model__nan_at=7, loop__max_nonfinite_steps=1) == 0
    return runs


def assert_same_rows(runs, name, other):
    one, two = runs.rows(name), runs.rows(other)
    place = ("kind", "step", "samples")
    assert [[row[key] for key in place] for row in two] == [[row[key] for key in place] for row in one]
    for key in ("loss", "loss_norm", "lr", "grad_norm"):
        assert [r.get(key, 0) for r in two] == pytest.approx([r.get(key, 0) for r in one], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FSDP)
def test_two_processes_match_one(launched, kind):
    runs = launched
    assert len(runs.rows("one", "train")) == 20
    assert_same_rows(runs, "one", kind)
    assert_same_rows(runs, "one_clipped", f"{kind}_clipped")
    seen = runs.json(kind, "spread.json")
    where = "shard" if FSDP[kind] else "whole"
    assert (seen["world_size"], seen["parameters"], seen["optimizer"]) == (2, [where], [where])
    assert seen["timeout_s"] >= 3600
    assert (seen["model"] == "DistributedDataParallel") is not FSDP[kind]
    assert (seen["held"] < seen["all"]) is FSDP[kind]


@pytest.mark.slow
def test_checkpoint_moves_between_one_process_ddp_and_fsdp(launched):
    runs = launched
    assert_same_rows(runs, "one", "moved")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", FSDP)
def test_nonfinite_step_of_one_rank_is_skipped_by_all(launched, kind, fault):
    runs = launched
    for name, expected in ((f"{kind}_{fault}_skipped", (20, 1)), (f"{kind}_{fault}", (7, 0))):
        one, other = runs.json(name, "spread.json")["ranks"]
        assert one == other and (one["steps"], one["skipped"]) == expected
        lines = map(json.loads, (runs.out / name / "events.jsonl").read_text().splitlines())
        (event,) = [line for line in lines if line["kind"] == "nonfinite"]
        finite = [(part["rank"], part["loss"] is not None) for part in event["micro_batches"]]
        assert event["step"] == 8 and event["grad_norm"] is None
        assert finite == [(0, True), (1, fault != "loss")]
    assert_same_rows(runs, "one_skipped", f"{kind}_{fault}_skipped")
    assert (runs.out / f"{kind}_{fault}/checkpoints/LAST").read_text() == "step_00000007\n"


@pytest.mark.slow
def test_fsdp_run_has_the_files_of_one_process(launched):
    runs = launched
    one, fsdp = (
        {str(path.relative_to(runs.out / name)) for path in (runs.out / name).rglob("*") if path.is_file()}
        for name in ("one", "fsdp")
    )
    assert fsdp - one == {"spread.json"} and not one - fsdp
    suffixes = {Path(name).suffix for name in one}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".txt", ".lock", ""}
    exported = [(runs.out / name / "export/weights.txt").read_text() for name in ("one", "fsdp")]
    torch.testing.assert_close(*(torch.tensor(list(flat(yaml.safe_load(text)))) for text in exported))


def flat(nested):
    return itertools.chain.from_iterable(map(flat, nested)) if isinstance(nested, list) else [nested]


@pytest.mark.parametrize(
    ("environment", "world_size", "message"),
    [
        ({}, 2, "loop.world_size is 2, but the world size is 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None, "fsdp_version is 1"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, None, "use schedule.batch_size"),
    ],
)
def test_conflicting_launcher_is_refused_before_the_build(runs, environment, world_size, message, monkeypatch, capsys):
    for name in ACCELERATE_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs.toy.ToyTask, "__init__", lambda task, config: pytest.fail("the task was built"))
    assert runs("run", **({} if world_size is None else {"loop__world_size": world_size})) == 2
    assert message in capsys.readouterr().err and not (runs.out / "run").exists()


EXPECTED = {
    "single_gpu": ("NO", 1, 1),
    "gpus_8": ("MULTI_GPU", 1, 8),
    "nodes_2x8": ("MULTI_GPU", 2, 16),
    "fsdp2": ("FSDP", 1, 8),
    "cpu_2": ("MULTI_GPU", 1, 2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_each_config(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == EXPECTED[name]
    assert config.mixed_precision == "no" and not config.use_cpu
    assert (config.fsdp_config.get("fsdp_version") == 2) is (name == "fsdp2")


@pytest.mark.slow
def test_fsdp2_config_shards_on_cpus(runs):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = f"accelerate.commands.launch --config_file {CONFIGS}/fsdp2.yaml --num_processes 2"
    command = [sys.executable, "-m", *launch.split(), str(runs.script), *runs.arguments("two", **PLAIN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert runs.json("two", "env.json")["world_size"] == 2
    assert runs.json("two", "summary.json")["parameter_types"] == ["DTensor"]
    assert done.stdout.count("finished    20 steps") == 1, done.stdout
    assert runs("one", **PLAIN) == 0
    assert_same_rows(runs, "one", "two")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])})
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))


def test_blocks_are_the_outermost_repeated_modules():
    model = Nested()
    assert blocks(model) == [*model.body["layers"].children(), *model.decoder]
