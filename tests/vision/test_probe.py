"""Whole small probes by the command: results, exact resume, and errors."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from moa_train.signals import EXIT_STOPPED
from moa_vision import pretrain
from moa_vision.data import normalize
from moa_vision.export import export_encoder
from moa_vision.mae import create_mae
from moa_vision.probe.classify import FinetuneTask, LinearTask
from moa_vision.probe.command import main
from moa_vision.probe.config import FinetuneConfig, LinearConfig, ProbeConfig
from moa_vision.probe.encoders import find_encoder
from moa_vision.probe.methods import TrainedProbe
from moa_vision.shards import ShardSettings, make_shards

ROOT = Path(__file__).parents[2]
CLASSES, SIZE = 6, (16, 16)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TIMINGS = ("wall_s", "throughput", "mfu")


def picture(rng, label):
    """Return noise whose colour and lower half depend on the class."""
    pixels = rng.integers(0, 120, (20, 24, 3))
    pixels[..., label % 3] += 60
    pixels[10:] += 60 * (label // 3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def labelled(tmp_path, encode, write_tar):
    """labelled(name, count) -> a tar of `count` pictures with labels first, first + 1, ..."""

    def labelled(name, count, *, first=0):
        rng = np.random.default_rng(len(name))
        members = []
        for i in range(count):
            members.append((f"{name}{i:02}.png", encode(picture(rng, i % CLASSES), "PNG")))
            members.append((f"{name}{i:02}.cls", str(first + i % CLASSES).encode()))
        return write_tar(tmp_path / f"{name}.tar", members)

    return labelled


@pytest.fixture
def encoder_run(tmp_path, labelled):
    """The folder of a finished run with 48 labelled training and 18 held-out pictures."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    folder = tmp_path / "run"
    mae = create_mae("vit_tiny_patch16_qdla", img_size=SIZE, encoder_args=sizes, **decoder)
    export_encoder(mae, folder / "export", MEAN, STD)
    data = {"train": str(labelled("train", 48)), "val": str(labelled("val", 18)), "workers": 0, "val_crop_pct": 1.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "run", "data": data}))
    (folder / "summary.json").write_text(json.dumps({"steps": 12, "status": "finished"}))
    return folder


@pytest.fixture
def arguments(encoder_run):
    """arguments(*methods, **changed) -> command line; 6 steps of 16 images for linear, 9 for finetune."""

    def arguments(*methods, **changed):
        values = {
            "knn.k": "[5, 3]",
            "linear.epochs": 2,
            "linear.warmup_epochs": 0,
            "linear.batch_size": 16,
            "linear.blr": 30,
            "finetune.epochs": 3,
            "finetune.warmup_epochs": 1,
            "finetune.batch_size": 16,
            "loop.micro_batch_size": 8,
            "loop.log_every": 1,
            "loop.val_every": 4,
            "checkpoint.interval": 3,
            "loop.trackers": "[]",
        } | {key.replace("__", "."): value for key, value in changed.items()}
        return [str(encoder_run), "--method", *methods, *(f"--{key}={value}" for key, value in values.items())]

    return arguments


@pytest.fixture
def run_probe(arguments):
    def run_probe(*methods, **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(arguments(*methods, **changed))

    return run_probe


def result(folder, name):
    return json.loads((folder / "probe" / f"{name}.json").read_text())


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def last_checkpoint(folder):
    return load_file(folder / "checkpoints" / (folder / "checkpoints/LAST").read_text().strip() / "model.safetensors")


def held_out():
    """Return the held-out pictures (18, 3, 16, 16) as a classifier sees them, and their labels."""
    rng, images = np.random.default_rng(len("val")), []
    for i in range(18):
        pixels = torch.from_numpy(np.array(picture(rng, i % CLASSES)))[:, 2:22].permute(2, 0, 1)[None]
        images.append(F.interpolate(pixels, SIZE, mode="bicubic", antialias=True))
    return normalize(torch.cat(images), MEAN, STD), torch.arange(18) % CLASSES


# nearest neighbours


def test_features_are_pooled_tokens_after_the_final_norm(encoder_run):
    encoder, images = find_encoder(encoder_run), held_out()[0]
    tokens = timm.create_model(f"local-dir:{encoder.export}", pretrained=True).eval().forward_features(images)
    torch.testing.assert_close(encoder.features("avg")(images), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(encoder.features("cls")(images), tokens[:, 0])


def test_knn_result(run_probe, encoder_run):
    assert run_probe("knn") == 0
    found = result(encoder_run, "knn")
    assert found["settings"].keys() == {"k", "temperature", "pool"}
    assert found["accuracy"] == found["accuracy_by_k"]["5"] > 0.5  # the pictures are easy
    assert 0.5 < found["top5"] <= 1 and found["step"] == 12 and found["seed"] == 0 and found["wall_s"] > 0
    assert (found["method"], found["name"], found["train_samples"], found["val_samples"]) == ("knn", "knn", 48, 18)
    assert found["train"].endswith("train.tar") and found["val"].endswith("val.tar")


def test_export_folder_with_other_data(encoder_run, labelled, tmp_path):
    alone = tmp_path / "alone"
    (encoder_run / "export").rename(alone)
    data = [f"--train={labelled('other', 30)}", f"--val={labelled('more', 12)}", "--data.workers=0"]
    assert main([str(alone), *data, "--name=other", "--knn.k=[7]"]) == 0
    found = result(alone, "knn-other")
    assert (found["method"], found["name"], found["step"]) == ("knn", "knn-other", None)
    assert (found["train_samples"], found["val_samples"]) == (30, 12)


def test_finished_runs_of_a_sweep(encoder_run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for name in ("b", "a", "unfinished"):
        shutil.copytree(encoder_run, sweep / name)
    shutil.rmtree(sweep / "unfinished" / "export")
    assert main([str(sweep), str(sweep / "a"), str(encoder_run), "--knn.k=[5]"]) == 0
    printed = capsys.readouterr()
    assert f"skipped unfinished runs: {sweep}/unfinished" in printed.err
    lines = [line.rpartition(": ")[2] for line in printed.out.splitlines() if line.startswith("knn ")]
    assert lines == [f"{folder}/probe/knn.json" for folder in (sweep / "a", sweep / "b", encoder_run)]


# trained probes


def test_linear_probe(run_probe, encoder_run):
    before = load_file(encoder_run / "export" / "model.safetensors")
    assert run_probe("linear", linear__epochs=20) == 0
    folder, found = encoder_run / "probe" / "linear", result(encoder_run, "linear")
    assert found["accuracy"] > 0.6  # the pictures are easy
    assert found["settings"]["lr"] == pytest.approx(30 * 16 / 256) and found["settings"]["epochs"] == 20
    trained = last_checkpoint(folder)
    frozen = {name.removeprefix("encoder."): t for name, t in trained.items() if name.startswith("encoder.")}
    assert frozen.keys() == before.keys() and all(torch.equal(before[name], frozen[name]) for name in before)
    assert trained["norm.num_batches_tracked"] == 60 * 2  # two micro-batches per step, no example batch
    assert json.loads((folder / "summary.json").read_text())["parameters"]["trained"] == 24 * CLASSES + CLASSES
    classifier = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    images, labels = held_out()
    with torch.no_grad():
        accuracy = (classifier(images).argmax(dim=1) == labels).float().mean().item()
    assert accuracy == pytest.approx(found["accuracy"])


def test_frozen_encoders_are_counted_without_a_backward_pass(encoder_run):
    recipes = {"linear": LinearConfig(batch_size=16), "finetune": FinetuneConfig(batch_size=16)}
    config, encoder = ProbeConfig(runs=[str(encoder_run)], **recipes), find_encoder(encoder_run)
    linear = LinearTask(TrainedProbe("linear", config, encoder).training, encoder)
    finetune = FinetuneTask(TrainedProbe("finetune", config, encoder).training, encoder)
    assert linear.forward_flops_per_sample == pytest.approx(finetune.forward_flops_per_sample / 3, rel=1e-4)


@pytest.mark.parametrize("method", ["linear", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_stopped_probe_resumes_exactly(run_probe, encoder_run, stopping, method):
    folder, unbroken = encoder_run / "probe" / method, encoder_run / "unbroken"
    assert run_probe(method) == 0
    expected = result(encoder_run, method)
    folder.rename(unbroken)
    (encoder_run / "probe" / f"{method}.json").unlink()
    with stopping(4):
        assert run_probe(method, "knn") == EXIT_STOPPED
    assert not list((encoder_run / "probe").glob("*.json"))
    assert run_probe(method, "knn", data__workers=1) == 0
    assert rows(folder) == rows(unbroken)
    ours, theirs = last_checkpoint(folder), last_checkpoint(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result(encoder_run, method) | {"wall_s": 0} == expected | {"wall_s": 0}
    assert result(encoder_run, "knn")["method"] == "knn"


def test_five_channels(tmp_path, run_probe, encoder_run, small_run, capsys):
    """Arrays of two classes: packing, pre-training, timm's loading and the probes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 12)):
        for i in range(count):
            pixels = rng.integers(0, 90, (20, 24, 5)).astype(np.uint8)
            pixels[: 10 * (i % 2)] += 120
            file = tmp_path / "arrays" / part / str(i % 2) / f"{i}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, pixels)
        make_shards(str(tmp_path / "arrays" / part), tmp_path / part, ShardSettings(channels=5))
    shutil.rmtree(encoder_run)
    AcceleratorState._reset_state(reset_partial_state=True)
    data = {"data__train": tmp_path / "train", "data__val": tmp_path / "val", "model__img_size": 16}
    assert pretrain.main(small_run(out=tmp_path, encoder_args={"in_chans": 5}, **data)) == 0
    model = timm.create_model(f"local-dir:{encoder_run / 'export'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (5, 16, 16) and config["mean"] == pytest.approx((0.449,) * 5)
    assert run_probe("knn") == 0 and result(encoder_run, "knn")["accuracy"] > 0.8
    assert run_probe("finetune") == 2
    assert "finetune.rand_augment is 'rand-m9-mstd0.5-inc1'; it must be null" in capsys.readouterr().err
    assert run_probe("finetune", finetune__rand_augment="null") == 0


# errors


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("knn", {"knn__k": "[49]"}, "knn.k is (49,); it must be at most the 48 training samples"),
        ("linear", {"linear__batch_size": 64}, "linear.batch_size is 64; it must be at most the 48 training"),
        ("knn", {"train": "{unlabelled}", "val": "{unlabelled}"}, "u1 in {unlabelled} and 1 other samples"),
        ("knn", {"train": "{few}", "val": "{many}"}, "has label 6, but the largest label in {few} is 5"),
    ],
)
def test_errors_are_one_line(run_probe, method, changed, message, labelled, write_tar, encode, capsys, tmp_path):
    image = encode(picture(np.random.default_rng(0), 0), "PNG")
    members = [("u0.png", image), ("u0.cls", b"0"), ("u1.png", image), ("u2.png", image)]
    paths = {
        "unlabelled": str(write_tar(tmp_path / "unlabelled.tar", members)),
        "few": str(labelled("few", 30)),
        "many": str(labelled("many", 7, first=1)),
    }
    assert run_probe(method, **{key: str(value).format_map(paths) for key, value in changed.items()}) == 2
    error = capsys.readouterr().err
    assert message.format_map(paths) in error and "Traceback" not in error and error.count("error:") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--loop.micro_batch_size=7", "loop.micro_batch_size is 7; it must be even"),
        ("--train=a.tar", "val is None; it must be given together with train"),
        ("--linear.epoch=3", "did you mean linear.epochs?"),
        ("--linear.min_lr=9", "linear.min_lr is 9.0; it must be from 0 to the peak learning rate (1.88)"),
    ],
)
def test_invalid_keys_are_rejected(arguments, option, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments("finetune"), option])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_check_reports_errors_and_writes_nothing(arguments, encoder_run, capsys):
    for options, code in (([], 0), (["--knn.k=[49]"], 2), (["--train=no.tar", "--val=no.tar"], 2)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments("knn"), *options, "--check"])
        assert stop.value.code == code
    assert "no.tar" in capsys.readouterr().err
    assert not (encoder_run / "probe").exists()


def test_commands_in_a_run_folder_are_not_run(run_probe, encoder_run, tmp_path, capsys):
    """A run folder may come from someone else; the command line is the user's."""
    train = f"{tmp_path}/train.tar"
    touch = f"touch {tmp_path}/ran; cat {train}"
    for data in ({"train": f"p{{ipe,}}:{touch}", "val": train}, {"train": train, "val": f"pipe:{touch}"}):
        (encoder_run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        assert run_probe("knn") == 2
        assert "runs a command (pipe:)" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    command = f"pipe:{touch}"
    assert run_probe("knn", train=command, val=command, data__cache_dir=tmp_path / "cache") == 0
    assert (tmp_path / "ran").exists()


def test_samples_without_an_image_count_as_bad(run_probe, encoder_run, write_tar, encode, tmp_path, capsys):
    image = encode(picture(np.random.default_rng(0), 0), "PNG")
    named = {}
    for split in ("train", "val"):
        members = [(f"{split}{i:02}.{kind}", data) for i in range(16) for kind, data in (("png", image), ("cls", b"0"))]
        named[split] = write_tar(tmp_path / f"odd_{split}.tar", [*members, (f"{split}-none.cls", b"0")])
    changed = named | {"data__cache_dir": tmp_path / "cache"}
    assert run_probe("knn", **changed, data__max_bad_samples=1) == 2
    assert "2 bad samples, more than data.max_bad_samples = 1 allows" in capsys.readouterr().err
    assert run_probe("knn", **changed, data__max_bad_samples=2) == 0
    lines = (encoder_run / "probe" / "knn.bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["train-none", "val-none"]


def test_runs_without_an_encoder_are_reported(encoder_run, tmp_path, capsys):
    assert find_encoder(encoder_run / "export") == find_encoder(encoder_run)
    (encoder_run / "export" / "model.safetensors").unlink()
    for folder, message in ((encoder_run, "the run is not finished"), (tmp_path / "no", "holds no exported encoder")):
        assert main([str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_classes_of_other_names_are_refused(run_probe, tmp_path, capsys, photos):
    packed = tmp_path / "packed"
    for split, names in (("train", "abc"), ("val", "abd"), ("fewer", "ab")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            photos[0].save(tmp_path / split / name / "1.jpg")
        make_shards(str(tmp_path / split), packed / split)
    assert run_probe("knn", train=packed / "train", val=packed / "val", knn__k="[1]") == 2
    assert "labels stand for other classes" in capsys.readouterr().err
    assert run_probe("knn", train=packed / "train", val=packed / "fewer", knn__k="[1]") == 0


@pytest.mark.parametrize("methods", [["knn"], ["linear", "finetune"]])
def test_a_launcher_can_run_one_trained_method_only(arguments, methods, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(*methods)) == 2
    assert "a launcher can run one of linear and finetune at a time" in capsys.readouterr().err


def test_help_documents_keys(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["probe.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/probe.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "probe.py RUN ..." in text and "--linear.epochs EPOCHS Passes over the training samples." in text
