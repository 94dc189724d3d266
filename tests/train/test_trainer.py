"""What the loop computes, against plain torch; how it ends; what it leaves behind."""

import inspect
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType

from moa_train.signals import EXIT_STOPPED


def plain_training(toy, config):
    """The same 15 steps written out with torch alone, in float64 on whole batches."""
    torch.manual_seed(config.seed)
    task = toy.ToyTask(config)
    model = task.model.double()
    decayed, others = [model[0].weight], [model[0].bias, model[3].weight, model[3].bias]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses, norms = [], []
    for step in range(15):
        warmup = 2  # round(0.5 epochs x 5 steps)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (15 - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step / warmup if step < warmup else cosine)
        rows = [toy.sample(config.seed, step // 5, step % 5 * 8 + i) for i in range(8)]
        x, y = (torch.stack(part).double() for part in zip(*rows, strict=True))
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())))
        losses.append(loss.item())
        optimizer.step()
    rows = [toy.sample(-1, 0, p) for p in range(7)]
    errors = [(model(x.double()) - y.double()).square().item() for x, y in rows]
    return losses, norms, sum(errors) / 7


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_equals_plain_torch_however_the_batch_is_split(runs, micro_batch):
    changed = {"model__dropout": 0.0, "loop__micro_batch_size": micro_batch}
    assert runs("run", **changed) == 0
    config = runs.toy.parse_config(
        runs.toy.ToyConfig, runs.arguments("run", **changed), program="toy", summary="A toy."
    )
    losses, norms, val_loss = plain_training(runs.toy, config)
    train = runs.rows("run", "train")
    assert [row["loss"] for row in train] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in train] == pytest.approx(norms, rel=1e-5)
    assert runs.rows("run", "val")[-1]["loss"] == pytest.approx(val_loss, rel=1e-5)


def test_clipping(runs):
    assert runs("run", optim__max_grad_norm=0.1, model__dropout=0.0) == 0
    assert runs("free", model__dropout=0.0) == 0
    norms = [row["grad_norm"] for row in runs.rows("run", "train")]
    assert norms[0] == runs.rows("free", "train")[0]["grad_norm"] > 0.1, "the norm before clipping is recorded"
    assert runs.final("run") != runs.final("free")


def test_not_finite_stops_before_the_step_and_can_be_continued(runs, capsys):
    assert runs("run", model__nan_at=7) == 1
    error = capsys.readouterr().err
    assert "step 8: the loss is nan" in error and "--resume force --optim.lr 0.005" in error
    folder = runs.out / "run"
    assert (folder / "checkpoints" / "LAST").read_text() == "step_00000007\n"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["loss"], last["grad_norm"]) == (8, None, None)
    assert runs.json("run", "summary.json")["status"] == "failed"
    assert runs("run") == 0  # the cause has gone
    assert runs("unbroken") == 0
    assert (runs.rows("run"), runs.final("run")) == (runs.rows("unbroken"), runs.final("unbroken"))


def test_not_finite_in_the_first_step(runs):
    assert runs("run", model__nan_at=0) == 1
    assert runs("run") == 0
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))


def test_run_folder(runs):
    assert runs("run") == 0
    folder = runs.out / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]
    environment = runs.json("run", "env.json")
    assert environment["torch"] == torch.__version__ and environment["packages"]["torch"]
    assert environment["device"] == "cpu" and environment["world_size"] == 1 and environment["cores"] >= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    place = ["kind", "step", "epoch", "samples", "wall_s"]
    assert list(lines[3]) == [*place, "loss", "lr", "grad_norm", "throughput", "mfu"]
    assert list(lines[4]) == [*place, "loss", "loss_norm"]
    assert [lines[4][key] for key in place[:-1]] == ["val", 4, 0.8, 32]
    summary = runs.json("run", "summary.json")
    val = runs.rows("run", "val")
    best = min(val, key=lambda row: row["loss_norm"])
    assert summary["best"] == {key: best[key] for key in ("loss", "loss_norm", "step")}
    assert summary["final"] == {key: val[-1][key] for key in ("loss", "loss_norm")}
    assert summary["flops_per_sample"] == 3000 and summary["flops_total"] == 3000 * 15 * 8
    assert summary["throughput"] > 0 and summary["peak_memory_mib"] > 0
    assert sorted(path.name for path in (folder / "reconstructions").iterdir()) == [
        *("12.txt", "15.txt", "4.txt", "8.txt")
    ]
    assert {path.read_text() for path in (folder / "reconstructions").iterdir()} == {"False"}, "in evaluation mode"
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(".*"))


def test_announcement(runs, capsys):
    runs("run", schedule__batch_size=16)
    text = capsys.readouterr().out
    assert "steps       6 = 3 epochs of 2, 1 of warm-up; 96 rows" in text
    assert "batch       16 rows per step = 4 accumulated x 1 device(s) x 4" in text
    assert "1 tensors (24) with weight decay 0.05; 3 tensors (17) without" in text
    assert "work        3 kFLOPs per sample in training, 288 kFLOPs remaining" in text
    assert "measured" in text and "validation  step 6, epoch 3.00: loss " in text


def test_impossible_batch_is_refused_before_anything_is_written(runs, capsys):
    assert runs("run", loop__micro_batch_size=3) == 2
    assert "the nearest are 6 and 9" in capsys.readouterr().err
    assert not (runs.out / "run").exists()


def test_tensorboard(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert runs("run", loop__trackers='["tensorboard"]', model__stop_at=6) == EXIT_STOPPED
    assert runs("run", loop__trackers='["tensorboard"]') == 0
    events = EventAccumulator(str(runs.out / "run" / "trackers" / "mixture-of-activations")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(row["step"], pytest.approx(row["loss"])) for row in runs.rows("run", "train")]


def record_of_inits(monkeypatch, name, init):
    """Put a module `name` in the place of a tracker's package; return what its `init` is called with."""
    calls = []

    def recorded(*args, **kwargs):
        bound = inspect.signature(init).bind(*args, **kwargs).arguments
        calls.append(bound)
        return SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: None)

    config = SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=recorded, config=config))
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name)])
    return calls


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
def test_all_sessions_of_a_run_are_one_run_for_its_tracker(runs, monkeypatch, tracker, init, key):
    calls = record_of_inits(monkeypatch, tracker, init)
    assert runs("run", loop__trackers=f"[{tracker}]", model__stop_at=6) == EXIT_STOPPED
    assert runs("run", loop__trackers=f"[{tracker}]") == 0
    assert runs("other", loop__trackers=f"[{tracker}]") == 0
    first, second, other = calls
    assert first == second and first["resume"] == "allow" and first[key] != other[key]
    shutil.rmtree(runs.out / "other")
    assert runs("other", loop__trackers=f"[{tracker}]") == 0
    assert calls[-1][key] != other[key], "a folder that was deleted is another run"
    if "dir" in first:
        assert Path(first["dir"]).is_dir() and Path(first["dir"]).parent == runs.out / "run"


@pytest.mark.parametrize(
    ("name", "told"), [("tensorbored", "must be among"), ("clearml", "not installed: pip install clearml")]
)
def test_missing_tracker(runs, name, told, capsys):
    assert runs("run", loop__trackers=f'["{name}"]') == 2
    error = capsys.readouterr().err
    assert name in error and told in error


def test_warm_up_steps_are_part_of_no_rate_and_no_time(runs, monkeypatch, capsys):
    """The first step of each session takes a minute, as if it compiled, the others a tenth of a second."""
    loss, began, now = runs.toy.ToyTask.loss, [], [0.0]

    def timed(task, model, batch):
        if batch[0] >= 0:
            now[0] += 0.05 if task in began else 60.0  # two micro-batches a step
            began.append(task)
        return loss(task, model, batch)

    monkeypatch.setattr(runs.toy.ToyTask, "loss", timed)
    monkeypatch.setattr("moa_train.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert runs("run", schedule__epochs=6, model__stop_at=14) == EXIT_STOPPED
    assert runs("run", schedule__epochs=6) == 0
    lines = [json.loads(line) for line in (runs.out / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = {row["step"]: row["throughput"] for row in lines if row["kind"] == "train"}
    assert {step for step, speed in speeds.items() if speed is None} == {*range(1, 6), *range(16, 21)}
    assert {round(speed) for speed in speeds.values() if speed is not None} == {80}
    summary = runs.json("run", "summary.json")
    assert summary["throughput"] == pytest.approx(80) and summary["wall_s"] > 120
    assert "finished    30 steps, 3 s of training: loss " in capsys.readouterr().out


def test_without_held_out_samples_the_end_tells_the_training_loss(runs, monkeypatch, capsys):
    build = runs.toy.ToyTask.__init__

    def without(task, config):
        build(task, config)
        task.val_samples = 0

    monkeypatch.setattr(runs.toy.ToyTask, "__init__", without)
    assert runs("run") == 0
    ending = f"of training: training loss {runs.rows('run', 'train')[-1]['loss']:.4f}\n"
    assert ending in capsys.readouterr().out


def test_bf16_autocast_keeps_float32_weights(runs):
    assert runs("half", loop__precision="bf16", model__dropout=0.0) == 0
    assert runs("full", model__dropout=0.0) == 0
    half, full = ([row["loss"] for row in runs.rows(name, "train")] for name in ("half", "full"))
    assert half != full and half == pytest.approx(full, rel=0.05)
    from safetensors.torch import load_file

    last = runs.out / "half" / "checkpoints" / "step_00000015" / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(last).values()} == {torch.float32}
    assert set(load_file(last)) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_task_may_bring_its_optimizer(runs, monkeypatch):
    """Plain gradient descent, the first layer at half the rate, written out beside it."""

    def optimizer(task, config):
        first, last = list(task.model[0].parameters()), list(task.model[3].parameters())
        return torch.optim.SGD([{"params": first, "lr_scale": 0.5}, {"params": last}], lr=config.lr)

    monkeypatch.setattr(runs.toy.ToyTask, "optimizer", optimizer, raising=False)
    changed = {"model__dropout": 0.0, "schedule__warmup_epochs": 0, "schedule__epochs": 1}
    assert runs("run", **changed) == 0
    config = runs.toy.parse_config(runs.toy.ToyConfig, runs.arguments("run", **changed), program="toy", summary="")
    torch.manual_seed(config.seed)
    model, losses = runs.toy.ToyTask(config).model, []
    for step in range(5):
        rows = [runs.toy.sample(config.seed, 0, step * 8 + i) for i in range(8)]
        x, y = (torch.stack(part) for part in zip(*rows, strict=True))
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        rate = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 5))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= (rate / 2 if name.startswith("0") else rate) * parameter.grad
    assert [row["loss"] for row in runs.rows("run", "train")] == pytest.approx(losses, rel=1e-5)
