"""The training loop against plain torch, the files and messages of a run, and trackers."""

import inspect
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType
from safetensors.torch import load_file

from moa_train.signals import EXIT_STOPPED


def batch_of(toy, config, step):
    rows = [toy.sample(config.seed, step // 5, step % 5 * 8 + i) for i in range(8)]
    return (torch.stack(part) for part in zip(*rows, strict=True))


def parsed(runs, **changed):
    return runs.toy.parse_config(runs.toy.ToyConfig, runs.arguments("run", **changed), program="toy", summary="A toy.")


def plain_training(toy, config):
    """Take the same 15 steps in float64 on whole batches with torch alone."""
    torch.manual_seed(config.seed)
    model = toy.ToyTask(config).model.double()
    decayed, others = [model[0].weight], [model[0].bias, model[3].weight, model[3].bias]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses, norms, warmup = [], [], 2  # round(0.5 epochs x 5 steps)
    for step in range(15):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (15 - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step / warmup if step < warmup else cosine)
        x, y = (part.double() for part in batch_of(toy, config, step))
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())))
        losses.append(loss.item())
        optimizer.step()
    rows = [toy.sample(-1, 0, p) for p in range(7)]
    errors = [(model(x.double()) - y.double()).square().item() for x, y in rows]
    return losses, norms, sum(errors) / 7


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_training_equals_plain_torch_for_every_micro_batch(runs, micro_batch):
    changed = {"model__dropout": 0.0, "loop__micro_batch_size": micro_batch}
    assert runs("run", **changed) == 0
    losses, norms, val_loss = plain_training(runs.toy, parsed(runs, **changed))
    train = runs.rows("run", "train")
    assert [row["loss"] for row in train] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in train] == pytest.approx(norms, rel=1e-5)
    assert runs.rows("run", "val")[-1]["loss"] == pytest.approx(val_loss, rel=1e-5)


def test_clipping_records_the_norm_before(runs):
    assert runs("run", optim__max_grad_norm=0.1, model__dropout=0.0) == 0
    assert runs("free", model__dropout=0.0) == 0
    assert runs.rows("run", "train")[0]["grad_norm"] == runs.rows("free", "train")[0]["grad_norm"] > 0.1
    assert runs.final("run") != runs.final("free")


def test_bf16_autocast_keeps_float32_weights(runs):
    assert runs("half", loop__precision="bf16", model__dropout=0.0) == 0
    assert runs("full", model__dropout=0.0) == 0
    half, full = ([row["loss"] for row in runs.rows(name, "train")] for name in ("half", "full"))
    assert half != full and half == pytest.approx(full, rel=0.05)
    weights = load_file(runs.out / "half/checkpoints/step_00000015/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_run_folder_contents(runs):
    assert runs("run") == 0
    folder = runs.out / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]
    environment = runs.json("run", "env.json")
    assert environment["torch"] == torch.__version__ and environment["packages"]["torch"]
    assert environment["device"] == "cpu" and environment["world_size"] == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    place = ["kind", "step", "epoch", "samples", "wall_s"]
    assert list(lines[3]) == [*place, "loss", "lr", "grad_norm", "throughput", "mfu"]
    assert list(lines[4]) == [*place, "loss", "loss_norm"]
    assert [lines[4][key] for key in place[:-1]] == ["val", 4, 0.8, 32]
    summary, val = runs.json("run", "summary.json"), runs.rows("run", "val")
    best = min(val, key=lambda row: row["loss_norm"])
    assert summary["best"] == {key: best[key] for key in ("loss", "loss_norm", "step")}
    assert summary["final"] == {key: val[-1][key] for key in ("loss", "loss_norm")}
    assert summary["flops_per_sample"] == 3000 and summary["flops_total"] == 3000 * 15 * 8
    pictures = {path.name: path.read_text() for path in (folder / "reconstructions").iterdir()}
    assert pictures == dict.fromkeys(("4.txt", "8.txt", "12.txt", "15.txt"), "False"), "in evaluation mode"
    assert not list(folder.rglob(".*"))


def test_startup_lines(runs, capsys):
    runs("run", schedule__batch_size=16)
    text = capsys.readouterr().out
    assert "steps       6 = 3 epochs of 2, 1 of warm-up; 96 rows" in text
    assert "batch       16 rows per step = 4 accumulated x 1 device(s) x 4" in text
    assert "1 tensors (24) with weight decay 0.05; AdamW: 3 tensors (17) with weight decay 0" in text
    assert "work        3 kFLOPs per sample in training, 288 kFLOPs remaining" in text
    assert "validation  step 6, epoch 3.00: loss " in text


def test_bug_keeps_its_traceback_and_marks_the_run_failed(runs, monkeypatch):
    loss = runs.toy.ToyTask.loss
    monkeypatch.setattr(
        runs.toy.ToyTask, "loss", lambda task, model, batch: {}["x"] if batch[0] == 3 else loss(task, model, batch)
    )
    with pytest.raises(KeyError, match="x"):
        runs("run")
    assert runs.json("run", "summary.json")["status"] == "failed"


def test_warmup_steps_do_not_enter_the_throughput(runs, monkeypatch, capsys):
    """The first step of each session takes a minute, the others a tenth of a second."""
    loss, seen, now = runs.toy.ToyTask.loss, [], [0.0]

    def timed(task, model, batch):
        if batch[0] >= 0:
            now[0] += 0.05 if task in seen else 60.0  # two micro-batches a step
            seen.append(task)
        return loss(task, model, batch)

    monkeypatch.setattr(runs.toy.ToyTask, "loss", timed)
    monkeypatch.setattr("moa_train.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("moa_train.devices.bf16_peak_flops", lambda name: 1e6)
    assert runs("run", schedule__epochs=6, model__stop_at=14) == EXIT_STOPPED
    assert runs("run", schedule__epochs=6) == 0
    lines = [json.loads(line) for line in (runs.out / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = {row["step"]: row["throughput"] for row in lines if row["kind"] == "train"}
    assert {step for step, speed in speeds.items() if speed is None} == {*range(1, 6), *range(16, 21)}
    assert {round(speed) for speed in speeds.values() if speed is not None} == {80}
    assert {round(row["mfu"], 4) for row in lines if row.get("mfu")} == {80 * 3000 / 1e6}
    summary = runs.json("run", "summary.json")
    assert summary["throughput"] == pytest.approx(80) and summary["wall_s"] > 120
    assert "finished    30 steps, 3 s of training: loss " in capsys.readouterr().out


def test_without_usable_held_out_samples_the_run_continues(runs, monkeypatch, capsys):
    monkeypatch.setattr(runs.toy.ToyTask, "val_batches", lambda task, share: [])
    assert runs("run") == 0
    assert "no held-out sample could be used" in capsys.readouterr().out
    assert runs.rows("run", "val") == [] and runs.json("run", "summary.json")["final"] is None


def test_tensorboard_of_a_resumed_run(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert runs("run", loop__trackers='["tensorboard"]', model__stop_at=6) == EXIT_STOPPED
    assert runs("run", loop__trackers='["tensorboard"]') == 0
    events = EventAccumulator(str(runs.out / "run" / "trackers" / "mixture-of-activations")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(row["step"], pytest.approx(row["loss"])) for row in runs.rows("run", "train")]


def wandb_init(  # 0.31
    entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
    config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
    force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
    sync_tensorboard=None, monitor_gym=None, settings=None,
):  # fmt: skip
    pass


def trackio_init(project, name=None, group=None, space_id=None, dataset_id=None, config=None, resume="never"):
    pass


@pytest.mark.parametrize(("tracker", "init", "key"), [("wandb", wandb_init, "id"), ("trackio", trackio_init, "name")])
def test_sessions_of_a_run_share_a_tracker_run(runs, monkeypatch, tracker, init, key):
    calls = []

    def recorded(*args, **kwargs):
        calls.append(inspect.signature(init).bind(*args, **kwargs).arguments)
        return SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: None)

    config = SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(init=recorded, config=config))
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(tracker)])
    assert runs("run", loop__trackers=f"[{tracker}]", model__stop_at=6) == EXIT_STOPPED
    assert runs("run", loop__trackers=f"[{tracker}]") == 0
    assert runs("other", loop__trackers=f"[{tracker}]") == 0
    first, second, other = calls
    assert first == second and first["resume"] == "allow" and first[key] != other[key]
    if "dir" in first:
        assert Path(first["dir"]).parent == runs.out / "run"


def test_failing_tracker_does_not_end_the_run(runs, monkeypatch, capsys):
    def full(self, values, step=None, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", full)
    assert runs("run", loop__trackers="[tensorboard]") == 0
    output = capsys.readouterr().out
    assert output.count("warning: trackers (tensorboard) failed: [Errno 28] No space left on device") == 1
    assert len(runs.rows("run", "train")) == 15


@pytest.mark.parametrize(("name", "message"), [("tensorbored", "must be among"), ("clearml", "pip install clearml")])
def test_unusable_tracker_is_refused(runs, name, message, capsys):
    assert runs("run", loop__trackers=f'["{name}"]') == 2
    error = capsys.readouterr().err
    assert name in error and message in error
