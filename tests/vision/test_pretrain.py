"""From shards to a run folder: whole tiny runs, their exact resume, and the configs that are shipped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

from moa_eval.training.reading import read_run
from moa_train.config import parse_config
from moa_train.signals import EXIT_STOPPED
from moa_vision import pretrain
from moa_vision.data import normalize
from moa_vision.export import load_mae
from moa_vision.index import ShardReader
from moa_vision.mae import parameter_counts
from moa_vision.pretrain import MAEConfig, MAETask, main
from moa_vision.shards import make_shards

CONFIGS = Path(__file__).parents[2] / "configs/mae"
TIMINGS = ("wall_s", "throughput", "mfu")


@pytest.fixture
def arguments(tmp_path, shards, write_tar, photos, encode):
    """Arguments of a run of 12 steps, 4 an epoch, with stochastic depth."""
    write_tar(tmp_path / "held-out.tar", [(f"{i}.jpg", encode(photo)) for i, photo in enumerate(photos)])

    def arguments(name="run", **changed):
        encoder = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.3}
        values = {
            "name": name,
            "out": tmp_path / "runs",
            "model.encoder": "vit_tiny_patch16_qdmoa",
            "model.img_size": [16, 24],
            "model.encoder_args": json.dumps(encoder),
            "model.decoder_dim": 16,
            "model.decoder_depth": 1,
            "model.decoder_heads": 2,
            "data.train": shards,
            "data.val": tmp_path / "held-out.tar",
            "data.workers": 0,
            "schedule.epochs": 3,
            "schedule.warmup_epochs": 1,
            "schedule.batch_size": 8,
            "loop.micro_batch_size": 4,
            "loop.log_every": 1,
            "loop.val_every": 5,
            "checkpoint.interval": 5,
            "loop.num_diagnostic_samples": 3,
            "loop.trackers": "[]",
        } | {key.replace("__", "."): value for key, value in changed.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    def train(name="run", **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(arguments(name, **changed)), tmp_path / "runs" / name

    return train


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def weights(folder, step=12):
    tensors = load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_a_run_leaves_what_the_report_reads(train):
    code, folder = train()
    assert code == 0
    record = read_run(folder)
    assert record.status == "finished" and record.ffn == "qdmoa" and record.peak_lr == 1e-3
    assert list(record.train["step"]) == list(range(1, 13)) and list(record.validation["step"]) == [5, 10, 12]
    assert record.train["loss"][-1] < record.train["loss"][0]
    assert list(record.validation["loss"]) == list(record.validation["loss_norm"])
    assert list(record.validation["loss_pixel"]) != list(record.validation["loss_norm"])
    assert record.reconstructions_step == 12
    assert [image.key for image in record.reconstructions] == [f"held-out/{i}" for i in range(3)]
    assert (folder / "reconstructions" / "grid_step_00000005.png").exists()
    summary = record.summary
    assert summary["parameters"] == parameter_counts(load_mae(folder / "export"))
    assert summary["bad_samples"] == 0 and summary["samples"] == 96 and summary["flops_per_sample"] % 3 == 0
    assert not list(folder.rglob(".*"))


def test_export_is_the_trained_model(train, tmp_path):
    _, folder = train(loop__precision="bf16")
    trained = load_file(folder / "checkpoints" / "step_00000012" / "model.safetensors")
    exported = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).state_dict()
    assert exported.keys() == {name.removeprefix("encoder.") for name in trained if name.startswith("encoder.")}
    assert all(exported[name].numpy().tobytes() == trained[f"encoder.{name}"].tobytes() for name in exported)


def test_validation_is_the_mean_over_images(train, arguments, tmp_path):
    _, folder = train(loop__micro_batch_size=2, loop__num_diagnostic_samples=4, schedule__epochs=1)
    mae = load_mae(folder / "export").eval()
    config = parse_config(MAEConfig, arguments(loop__num_diagnostic_samples=4), program="", summary="")
    shown = MAETask(config)._shown
    assert shown is not None
    images, noise, _ = shown
    assert len(images) == 4, "all there are"
    images = normalize(images, config.data.mean, config.data.std)
    with torch.no_grad():
        one_by_one = [mae(images[i : i + 1], noise[i : i + 1]).loss.item() for i in range(4)]
    assert rows(folder)[-1]["loss"] == pytest.approx(sum(one_by_one) / 4, rel=1e-5)


@pytest.mark.parametrize("stops", [(3,), (4, 8)], ids=["at an epoch's end", "twice, within epochs"])
def test_exact_resume(train, stops, monkeypatch):
    _, unbroken = train("unbroken")
    loss = MAETask.loss
    seen = []

    def interrupted(self, model, batch):
        seen.append(len(batch.images))
        if len(seen) == pending[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, model, batch)

    monkeypatch.setattr(MAETask, "loss", interrupted)
    done, folder = 0, unbroken
    for stop in stops:
        seen.clear()
        pending = [2 + 2 * (stop - done) + 1]  # two example batches, two micro-batches a step
        code, folder = train("run")
        assert code == EXIT_STOPPED
        done = json.loads((folder / "summary.json").read_text())["steps"]
        assert done == stop + 1
    monkeypatch.setattr(MAETask, "loss", loss)
    assert train("run")[0] == 0
    assert rows(folder) == rows(unbroken)
    assert weights(folder) == weights(unbroken)


@pytest.mark.slow
def test_a_resumed_run_reads_what_is_left_and_nothing_before(train, stopping, monkeypatch):
    read, samples = ShardReader.read, {"shards": [], "held-out.tar": []}

    def noted(reader, sample):
        path = Path(reader.index.shards[0].url)
        samples[path.name if path.name in samples else path.parent.name].append(sample)
        return read(reader, sample)

    def session(name):
        for part in samples.values():
            part.clear()
        code, _ = train(name)
        return code, list(samples["shards"]), list(samples["held-out.tar"])

    monkeypatch.setattr(ShardReader, "read", noted)
    code, train_reads, val_reads = session("unbroken")
    assert code == 0 and len(train_reads) == 12 * 8 and len(set(train_reads[:32])) == 32, "an epoch is all of them"
    shown, held_out = val_reads[4:7], val_reads[:4]  # the first validation, then three of its images, once a session
    assert val_reads == held_out + shown + 2 * held_out
    with stopping(6):
        assert session("run") == (EXIT_STOPPED, train_reads[: 6 * 8], held_out + shown)
    assert session("run") == (0, train_reads[6 * 8 :], held_out + shown + held_out)


@pytest.mark.slow
def test_killed_at_random_moments_with_workers(train, arguments):
    """kill -9 of the training process only, twelve times; its workers have to end by themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moa_vision.pretrain"])
    draw, changed, survivors = random.Random(0), {"data__workers": 2, "checkpoint__interval": 2}, []
    folder = Path(arguments()[1].removeprefix("--out=")) / "run"
    for _ in range(12):
        process = context.Process(target=main, args=(arguments("run", **changed),))
        process.start()
        metrics, begun = folder / "metrics.jsonl", time.monotonic()
        aim = (len(rows(folder)) if metrics.exists() else 0) + draw.randrange(1, 4)
        while process.is_alive() and time.monotonic() < begun + 60:
            if metrics.exists() and metrics.read_text().count("\n") >= aim:
                break
            time.sleep(0.005)
        survivors += psutil.Process(process.pid).children() if process.is_alive() else []
        process.kill()
        process.join()
    _, alive = psutil.wait_procs(survivors, timeout=60)
    assert not alive
    assert train("run", **changed)[0] == train("unbroken", **changed)[0] == 0
    unbroken = folder.parent / "unbroken"
    assert rows(folder) == rows(unbroken)
    assert weights(folder) == weights(unbroken)


def test_workers_and_micro_batches_do_not_change_the_data(train):
    _, one = train("one", model__encoder_args='{"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4}')
    _, other = train(
        "other",
        model__encoder_args='{"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4}',
        data__workers=2,
        loop__micro_batch_size=8,
    )
    assert [row["loss"] for row in rows(other)] == pytest.approx([row["loss"] for row in rows(one)], rel=1e-4)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(train, shards, write_tar, photos, encode, tmp_path, capsys):
    code, folder = train()
    assert code == 0
    (folder / "summary.json").unlink()
    shutil.copytree(shards, tmp_path / "elsewhere")
    shutil.rmtree(shards)
    (tmp_path / "elsewhere").rename(shards)  # the same, written anew
    assert train()[0] == 0
    (folder / "summary.json").unlink()
    write_tar(shards / "d.tar", [("another.jpg", encode(photos[0]))])
    capsys.readouterr()
    assert train()[0] == 2
    assert "was trained on other data: train samples changed since" in capsys.readouterr().err
    assert train(resume="force")[0] == 0


def test_bad_samples_are_named_counted_and_limited(train, shards, write_tar, photos, encode, capsys):
    good, cut = (encode(photos[i]) for i in (0, 1))
    write_tar(shards / "f.tar", [("f0.jpg", good), ("f1.jpg", cut[: len(cut) // 2]), ("f2.jpg", b"no image")])
    code, folder = train()
    assert code == 0
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(sample["key"] for sample in bad) == ["f1", "f2"], "each once in three epochs"
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == 2
    assert "skipped f1 in " in capsys.readouterr().out
    for workers in (0, 1):
        code, _ = train(f"strict{workers}", data__max_bad_samples=workers, data__workers=workers)
        error = capsys.readouterr().err
        assert code == 1 and ("f1" in error or "f2" in error)
        assert error.startswith("error: ") and "Traceback" not in error


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data__train": "nowhere/*.tar"}, "nowhere/*.tar"),
        ({"model__encoder": "vit_base_patch16_qdmoe"}, "'vit_base_patch16_qdmoe' is not a timm model; did you mean"),
        ({"model__encoder_args": '{"dept": 3}'}, "unknown 'dept'"),
        ({"model__img_size": 17}, "17"),
        ({"model__mask_ratio": 0.999}, "mask_ratio=0.999"),
        ({"schedule__batch_size": 64}, "schedule.batch_size is 64; it must be at most the training set's 32"),
    ],
)
def test_what_cannot_work_is_told_in_one_message(train, changed, told, capsys):
    code, folder = train(**changed)
    error = capsys.readouterr().err
    assert code == 2
    assert told in error and "Traceback" not in error and error.count("error:") == 1
    assert not folder.exists()


def test_a_wrong_key_is_told(arguments, capsys):
    for argument, told in (
        ("--model.encodr=x", "did you mean model.encoder?"),
        ("--data.shuffle_window_shards=0", "window"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments(), argument])
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in (
        "timm name of the encoder",
        "--data.train",
        "--optim.lr",
        "Steps between checkpoints",
        "pretrain_mae.py",
    ):
        assert words in text


def test_no_arguments_train_on_the_photographs(tmp_path, monkeypatch, photos, capsys):
    """The default config, here cut short, with a few photographs instead of the demo's many crops."""
    monkeypatch.chdir(tmp_path)

    def few(out):
        (tmp_path / "images").mkdir()
        for number, photo in enumerate(photos):
            photo.save(tmp_path / "images" / f"{number}.jpg")
        for split in ("train", "val"):
            make_shards(str(tmp_path / "images"), out / split, workers=1)

    monkeypatch.setattr(pretrain, "make_photograph_shards", few)
    small = yaml.safe_load((CONFIGS / "laptop_qdmoa.yaml").read_text())
    small["schedule"] |= {"epochs": 1, "batch_size": 4, "warmup_epochs": 0}
    small["data"] |= {"repeated_augmentation": 1}
    small["loop"] |= {"micro_batch_size": 4, "trackers": []}
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(small))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([], default=tmp_path / "default.yaml") == 0
    assert "packing the photographs" in capsys.readouterr().out
    assert read_run(tmp_path / "runs" / "laptop_qdmoa").status == "finished"
