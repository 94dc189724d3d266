"""MAE training on two processes, with DDP and FSDP2, against one process."""

import json

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from moa_train.signals import EXIT_STOPPED
from moa_vision.export import load_mae
from moa_vision.pretrain import main

pytestmark = pytest.mark.slow
WAYS = {"ddp": False, "fsdp": True}


@pytest.fixture
def launch(tmp_path, shards, write_tar, photos, encode, two_processes, stopping, small_run):
    """launch(**changed) runs 20 steps on one process ("one") and on two ("ddp", "fsdp").

    With `moved`, the run "moved" is on one process to step 5, on DDP to 10, on FSDP2 to 15 and on one to the end.
    """
    write_tar(tmp_path / "held-out.tar", [(f"{i}.jpg", encode(photo)) for i, photo in enumerate(photos[:3])])
    often = {"loop__val_every": 10, "checkpoint__interval": 20, "loop__num_diagnostic_samples": 2}
    schedule = {"schedule__epochs": 5, "schedule__warmup_epochs": 1}
    data = {"data__train": shards, "data__val": tmp_path / "held-out.tar"}
    values = {"out": tmp_path, "model__decoder_depth": 2, **data, **schedule, **often}
    (tmp_path / "empty.yaml").write_text("seed: 0")

    def alone(arguments, last=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        with stopping(last):
            return main(arguments)

    def launch(moved=False, **changed):
        def arguments(name):
            return [f"--config={tmp_path}/empty.yaml", *small_run(**{**values, "name": name, **changed})]

        jobs = [{"main": "moa_vision.pretrain", "arguments": arguments(way), "fsdp": WAYS[way]} for way in WAYS]
        if moved:
            assert alone(arguments("moved"), last=5) == EXIT_STOPPED
            stopped = {"arguments": arguments("moved"), "code": EXIT_STOPPED}
            jobs = [job | stopped | {"last": last} for job, last in zip(jobs, (10, 15), strict=True)]
        two_processes(jobs, tmp_path)
        assert alone(arguments("one")) == 0
        assert not moved or alone(arguments("moved")) == 0
        return tmp_path

    return launch


def rows(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


def losses(folder):
    return [row["loss"] for kind in ("train", "val") for row in rows(folder, kind)]


def test_two_processes_reach_the_losses_of_one(launch):
    out = launch()
    assert len(rows(out / "one", "train")) == 20
    for way, fsdp in WAYS.items():
        assert losses(out / way) == pytest.approx(losses(out / "one"), rel=1e-6), way
        seen = json.loads((out / way / "spread.json").read_text())
        where = "shard" if fsdp else "whole"
        assert (seen["world_size"], seen["parameters"], seen["optimizer"]) == (2, [where], [where])
        saved = load_file(out / way / "checkpoints/step_00000020/model.safetensors")
        exported = load_mae(out / way / "export").state_dict()
        assert all((exported[name] == tensor).all() for name, tensor in saved.items())
        files = [{p.name for p in (out / name).rglob("*") if p.name != "spread.json"} for name in ("one", way)]
        assert files[0] == files[1]


def test_a_checkpoint_moves_between_one_process_ddp_and_fsdp(launch):
    out = launch(moved=True)
    assert losses(out / "moved") == pytest.approx(losses(out / "one"), rel=1e-6)
    steps = [[(row["step"], row["samples"]) for row in rows(out / name, "train")] for name in ("one", "moved")]
    assert steps[0] == steps[1]
    events = [json.loads(line) for line in (out / "moved/events.jsonl").read_text().splitlines()]
    sessions = [(event["step"], event["processes"]) for event in events if event["kind"] == "begun"]
    assert sessions == [(0, 1), (5, 2), (10, 2), (15, 1)]


def test_two_processes_reach_the_losses_of_one_compiled_in_bf16(launch):
    out = launch(loop__compile="true", loop__precision="bf16", schedule__epochs=1)
    for way in WAYS:
        assert losses(out / way) == pytest.approx(losses(out / "one"), rel=5e-3), way
