"""Probes against timm, scikit-learn and the formulas of MAE's code; whole tiny ones, killed and resumed."""

import gzip
import json
import math
import os
import random
import runpy
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from moa_train.config import parse_config
from moa_train.errors import DataError
from moa_train.signals import EXIT_STOPPED
from moa_vision import pretrain
from moa_vision.data import ImageBatch, normalize
from moa_vision.export import export_encoder
from moa_vision.mae import create_mae
from moa_vision.probe import command as probe
from moa_vision.probe import labelled as labelled_sets
from moa_vision.probe.augment import Mixing, RandAugmented, drawing_from, seed_of
from moa_vision.probe.classify import FinetuneTask, LinearProbe, LinearTask, layer_groups
from moa_vision.probe.encoders import find_encoder
from moa_vision.probe.knn import Features, KNNConfig, knn_accuracies, neighbours, votes
from moa_vision.shards import ShardSettings, make_shards

ROOT = Path(__file__).parents[2]
CLASSES, SIZE = 6, (16, 16)
TIMINGS = ("wall_s", "throughput", "mfu")


def picture(rng, label):
    """Noise whose colour and lower half say the class."""
    pixels = rng.integers(0, 120, (20, 24, 3))
    pixels[..., label % 3] += 60
    pixels[10:] += 60 * (label // 3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def labelled(tmp_path, encode, write_tar):
    """labelled(name, count) -> a tar of `count` pictures, CLASSES of them after one another."""

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
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    folder = tmp_path / "run"
    mae = create_mae("vit_tiny_patch16_qdla", img_size=SIZE, encoder_args=sizes, **decoder)
    export_encoder(mae, folder / "export", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    data = {"train": str(labelled("train", 48)), "val": str(labelled("val", 18)), "workers": 0, "val_crop_pct": 1.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "run", "data": data}))
    (folder / "summary.json").write_text(json.dumps({"steps": 12, "status": "finished"}))
    return folder


@pytest.fixture
def arguments(encoder_run):
    """Arguments of short probes: 6 steps of 16 images for the linear one, 9 for fine-tuning."""

    def arguments(*methods, **changed):
        values = {
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
        return probe.main(arguments(*methods, **changed))

    return run_probe


def result(folder, name):
    return json.loads((folder / "probe" / f"{name}.json").read_text())


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def last_checkpoint(folder):
    return folder / "checkpoints" / (folder / "checkpoints" / "LAST").read_text().strip()


def held_out(folder):
    """The held-out pictures as a classifier sees them, (18, 3, 16, 16), and their labels, read by PIL and torch."""
    rng, images = np.random.default_rng(len("val")), []
    for i in range(18):
        pixels = torch.from_numpy(np.array(picture(rng, i % CLASSES)))[:, 2:22].permute(2, 0, 1)[None]
        images.append(F.interpolate(pixels, SIZE, mode="bicubic", antialias=True))
    return normalize(torch.cat(images), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), torch.arange(18) % CLASSES


# ------------------------------------------------------------------------------------------------ nearest neighbours


def unit_features(count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = F.normalize(torch.randn(count, 5, generator=generator), dim=1)
    return Features(values, torch.randint(CLASSES, (count,), generator=generator))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.data())
def test_neighbours_are_those_of_a_full_sort(queries, bank, chunk, data):
    k = data.draw(st.integers(1, bank))
    asked, known = unit_features(queries, 1).values, unit_features(bank, 2).values
    similarity, number = neighbours(asked, known, k, chunk)
    expected = (asked @ known.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected.values[:, :k])
    assert torch.equal(number, expected.indices[:, :k])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_equal_scikit_learn(k):
    train, val = unit_features(60, 3), unit_features(25, 4)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.values, train.labels)
    similarity, number = neighbours(val.values, train.values, k, chunk=7)
    ours = votes(similarity, train.labels[number], CLASSES, 0.07)
    assert np.allclose(F.normalize(ours, p=1, dim=1), theirs.predict_proba(val.values), atol=1e-5)
    accuracies = knn_accuracies(train, val, CLASSES, KNNConfig(k=(k, 2)), chunk=10)
    assert accuracies[k][0] == pytest.approx(theirs.score(val.values, val.labels))
    assert accuracies.keys() == {k, 2}


def test_a_class_without_a_vote_is_not_among_the_five():
    train = Features(torch.eye(6), torch.arange(6))
    val = Features(torch.eye(6)[:1], torch.tensor([4]))  # its one neighbour says 0
    assert knn_accuracies(train, val, 6, KNNConfig(k=(1, 6))) == {1: (0.0, 0.0), 6: (0.0, 1.0)}


def test_features_are_the_pooled_tokens_after_the_last_norm(encoder_run):
    encoder, images = find_encoder(encoder_run), held_out(encoder_run)[0]
    tokens = timm.create_model(f"local-dir:{encoder.export}", pretrained=True).eval().forward_features(images)
    torch.testing.assert_close(encoder.features("avg")(images), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(encoder.features("cls")(images), tokens[:, 0])


def test_nearest_neighbours_from_shards_to_the_result(run_probe, encoder_run):
    assert run_probe("knn", knn__k="[5, 3]") == 0
    found = result(encoder_run, "knn")
    assert found["settings"].keys() == {"k", "temperature", "pool"}, "no result: reports compare settings"
    assert found["accuracy"] == found["accuracy_by_k"]["5"] > 0.5, "the pictures are easy"
    assert 0.5 < found["top5"] <= 1 and found["step"] == 12 and found["seed"] == 0 and found["wall_s"] > 0
    assert (found["method"], found["name"], found["train_samples"], found["val_samples"]) == ("knn", "knn", 48, 18)
    assert found["train"].endswith("train.tar") and found["val"].endswith("val.tar")


def test_an_export_folder_and_other_data_under_a_name(run_probe, encoder_run, labelled, tmp_path):
    alone = tmp_path / "alone"
    (encoder_run / "export").rename(alone)
    other = [f"--train={labelled('other', 30)}", f"--val={labelled('more', 12)}", "--name=other", "--knn.k=[7]"]
    other.append("--data.workers=0")
    assert probe.main([str(alone), *other]) == 0
    found = result(alone, "knn-other")
    assert (found["method"], found["name"], found["step"]) == ("knn", "knn-other", None)
    assert (found["train_samples"], found["val_samples"]) == (30, 12)


def test_all_finished_runs_of_a_sweep_and_others(run_probe, encoder_run, tmp_path, capsys):
    """A folder of runs stands for those of its runs that have an encoder; each run is taken once."""
    for name in ("b", "a", "unfinished"):
        shutil.copytree(encoder_run, tmp_path / "sweep" / name)
    shutil.rmtree(tmp_path / "sweep" / "unfinished" / "export")
    (tmp_path / "sweep" / "logs").mkdir()
    folders = [str(tmp_path / "sweep"), str(tmp_path / "sweep" / "a"), str(encoder_run)]
    assert probe.main([*folders, "--knn.k=[5]"]) == 0
    told = capsys.readouterr()
    assert f"passed over {tmp_path}/sweep/unfinished: not finished" in told.err
    lines = [line.rpartition(": ")[2] for line in told.out.splitlines() if line.startswith("knn ")]
    assert lines == [
        f"{folder}/probe/knn.json" for folder in (f"{tmp_path}/sweep/a", f"{tmp_path}/sweep/b", encoder_run)
    ]
    shutil.rmtree(tmp_path / "sweep" / "a" / "export")
    shutil.rmtree(tmp_path / "sweep" / "b" / "export")
    assert probe.main(folders[:1]) == 2
    assert "none of the 3 runs in" in capsys.readouterr().err


def test_nearest_neighbours_are_not_looked_for_twice(run_probe, encoder_run, monkeypatch, capsys):
    extract, calls = probe.extract, []
    monkeypatch.setattr(probe, "extract", lambda *words, **named: calls.append(1) or extract(*words, **named))
    assert run_probe("knn", knn__k="[5, 3]") == 0 and len(calls) == 2
    expected = capsys.readouterr().out.strip()
    assert run_probe("knn", knn__k="[5, 3]") == 0 and len(calls) == 2
    assert capsys.readouterr().out.strip() == f"{expected}, found before"
    changes = ({"knn__k": "[3, 5]"}, {"loop__val_samples": 9}, {"data__val_crop_pct": 0.5}, {"resume": "force"})
    for changed in changes:
        before = len(calls)
        assert run_probe("knn", **({"knn__k": "[5, 3]"} | changed)) == 0 and len(calls) == before + 2
    weights = encoder_run / "export" / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    assert run_probe("knn", knn__k="[5, 3]") == 0 and len(calls) == 2 * (len(changes) + 2), "another encoder"


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000, "{", None], ids=["list", "null", "deep", "cut", "key"])
def test_a_broken_result_is_found_anew(run_probe, encoder_run, text, capsys):
    assert run_probe("knn", knn__k="[5]") == 0
    expected = result(encoder_run, "knn")
    path = encoder_run / "probe" / "knn.json"
    path.write_text(json.dumps(expected | {"accuracy": "high"}) if text is None else text)
    assert run_probe("knn", knn__k="[5]") == 0 and "found before" not in capsys.readouterr().out
    assert result(encoder_run, "knn")["accuracy"] == expected["accuracy"]


def test_check_finds_what_is_wrong_and_does_nothing(arguments, encoder_run, capsys):
    for words, code in ((["--knn.k=[5]"], 0), (["--knn.k=[49]"], 2), (["--train=no.tar", "--val=no.tar"], 2)):
        with pytest.raises(SystemExit) as stop:
            probe.main([*arguments("knn"), *words, "--check"])
        assert stop.value.code == code
    assert "'no.tar' does not exist" in capsys.readouterr().err
    assert not (encoder_run / "probe").exists()


# ------------------------------------------------------------------------------------------------ recipes


def layer_of(name, depth):
    """facebookresearch/mae, util/lr_decay.py, get_layer_id_for_vit."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("layer_decay", [0.65, 1.0])
def test_layer_groups_are_those_of_mae(encoder_run, layer_decay):
    model = find_encoder(encoder_run).load(num_classes=CLASSES, global_pool="avg")
    groups = layer_groups(model, 0.05, layer_decay)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(named) == len(found)
    assert any(name.endswith("mix_coef") for name in named)
    for name, parameter in named.items():
        spared = parameter.ndim == 1 or name in ("cls_token", "pos_embed") or name.endswith("mix_coef")
        scale = layer_decay ** (3 - layer_of(name, 2))
        assert found[id(parameter)] == (pytest.approx(scale), 0.0 if spared else 0.05), name


def test_lars_is_that_of_mae(arguments, encoder_run):
    """facebookresearch/mae, util/lars.py: v = m v + trust |p| / |g| g for weights, v = m v + g for vectors."""
    config = parse_config(probe.ProbeConfig, arguments("linear"), program="", summary="", plain=probe.WORDS)
    task = LinearTask(probe.classifier_run(config, find_encoder(encoder_run), "linear"), find_encoder(encoder_run))
    optimizer = task.optimizer(probe.OptimConfig(lr=0.5, weight_decay=0.0))
    parameters = [task.probe.head.weight, task.probe.head.bias]
    expected = [p.detach().double() for p in parameters]
    speeds = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            update = parameter.grad.double()
            if update.ndim > 1:
                update = update * 0.001 * expected[i].norm() / update.norm()
            speeds[i] = 0.9 * speeds[i] + update
            expected[i] = expected[i] - 0.5 * speeds[i]
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def a_batch(count=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *SIZE, generator=generator), torch.arange(count) % CLASSES


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_the_smoothed_cross_entropy(smoothing):
    images, labels = a_batch()
    mixing = Mixing(CLASSES, mixup=0, cutmix=0, smoothing=smoothing, erase=0)
    same, targets = mixing(images.clone(), labels, 3)
    logits = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(1))
    ours = SoftTargetCrossEntropy()(logits, targets)
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(smoothing)(logits, labels))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert torch.equal(same, images)


@pytest.mark.parametrize("seed", range(6))
def test_mixing_is_timms(seed):
    images, labels = a_batch()
    ours = Mixing(CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0)(images.clone(), labels, seed)
    np.random.seed(seed)
    theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(images.clone(), labels)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], images)


def test_a_made_up_batch_is_neither_mixed_nor_erased():
    images, labels = a_batch(1)
    same, targets = Mixing(CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.0, erase=1)(images.clone(), labels, None)
    assert torch.equal(same, images) and torch.equal(targets, F.one_hot(labels, CLASSES).float())


def test_erasing_replaces_a_rectangle():
    images, labels = a_batch()
    erased, _ = Mixing(CLASSES, mixup=0, cutmix=0, smoothing=0, erase=1)(images.clone(), labels, 1)
    for before, after in zip(images, erased, strict=True):
        changed = (before != after).all(dim=0)
        rows_, columns = changed.any(dim=1), changed.any(dim=0)
        assert 0 < changed.sum() == rows_.sum() * columns.sum() < changed.numel()


def test_global_generators_are_left_alone():
    random.seed(5)
    np.random.seed(6)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(6)
    with drawing_from(3):
        inside = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
    random.seed(3)
    np.random.seed(3)
    assert inside == (random.random(), np.random.rand())


def uint8_batch(rng, count):
    images = torch.from_numpy(rng.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    noise = torch.from_numpy(rng.random((count, 4), dtype=np.float32))
    return ImageBatch(images, noise, [""] * count, torch.zeros(count, dtype=torch.int64), [])


def test_rand_augment_is_that_of_timms_recipe():
    policy, mean = "rand-m9-mstd0.5-inc1", (0.4, 0.5, 0.6)
    ours = RandAugmented(policy, (32, 40), mean).transform
    whole = create_transform((32, 40), is_training=True, auto_augment=policy, mean=mean, interpolation="bicubic")
    (theirs,) = (part for part in whole.transforms if type(part) is type(ours))
    assert ours.num_layers == theirs.num_layers and repr(ours).replace(", mmax=9.999", "") == repr(theirs)
    for op, other in zip(ours.ops, theirs.ops, strict=True):
        assert (op.aug_fn, op.kwargs) == (other.aug_fn, other.kwargs)
        assert op.hparams["translate_const"] == other.hparams["translate_const"]


def test_an_image_is_augmented_by_its_own_numbers_alone():
    batch = uint8_batch(np.random.default_rng(0), 12)
    before = batch.images.clone()
    augment = RandAugmented("rand-m9-mstd0.5-inc1", SIZE, (0.5, 0.5, 0.5))
    alone = [augment(ImageBatch(before[i : i + 1].clone(), batch.noise[i : i + 1], [""], batch.labels[:1], []))
             for i in range(12)]  # fmt: skip
    together = augment(batch)
    assert together is batch and torch.equal(batch.images, torch.cat([one.images for one in alone]))
    assert sum(not torch.equal(a, b) for a, b in zip(before, batch.images, strict=True)) > 6
    assert seed_of(batch.noise[0]) != seed_of(batch.noise[1])


def test_the_strongest_augmentation_works():
    """timm posterizes to 0 bits at the top of its scale, which Pillow 13 refuses."""
    augment = RandAugmented("rand-m10-n1-p1-inc1", SIZE, (0.5, 0.5, 0.5))
    image = Image.fromarray(np.full((*SIZE, 3), 200, np.uint8))
    names = [op.name for op in augment.transform.ops]
    assert "PosterizeIncreasing" in names
    for op in augment.transform.ops:
        with drawing_from(0):
            assert op(image).size == SIZE


def test_rand_augment_takes_grey_of_8_bits():
    augment = RandAugmented("rand-m9-mstd0.5-inc1", SIZE, (0.5,))
    batch = uint8_batch(np.random.default_rng(0), 6)
    grey = batch._replace(images=batch.images[:, :1].clone())
    before = grey.images.clone()
    assert augment(grey).images.shape == before.shape and not torch.equal(grey.images, before)
    with pytest.raises(DataError, match=r"finetune\.rand_augment null"):
        augment(grey._replace(images=before / 255))


# ------------------------------------------------------------------------------------------------ whole probes


TRAINED = ("linear", "finetune")


@pytest.mark.parametrize(("channels", "methods"), [
    (5, ()),
    pytest.param(1, TRAINED, marks=pytest.mark.slow),
    pytest.param(5, TRAINED, marks=pytest.mark.slow),
])  # fmt: skip
def test_other_numbers_of_channels(channels, methods, tmp_path, run_probe, encoder_run, monkeypatch, capsys):
    """From arrays of two classes through pre-training to an encoder that timm and every probe take."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 12)):
        for i in range(count):
            pixels = rng.integers(0, 90, (20, 24, channels)).astype(np.uint8)
            pixels[: 10 * (i % 2)] += 120
            file = tmp_path / "arrays" / part / str(i % 2) / f"{i}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, pixels)
        make_shards(str(tmp_path / "arrays" / part), tmp_path / part, ShardSettings(channels=channels))
    encoder = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "in_chans": channels}
    shutil.rmtree(encoder_run)
    words = {
        "name": "run",
        "out": tmp_path,
        "model.img_size": 16,
        "model.encoder_args": json.dumps(encoder),
        "model.decoder_dim": 16,
        "model.decoder_depth": 1,
        "model.decoder_heads": 2,
        "data.train": tmp_path / "train",
        "data.val": tmp_path / "val",
        "data.workers": 0,
        "schedule.epochs": 2,
        "schedule.warmup_epochs": 0,
        "schedule.batch_size": 8,
        "loop.micro_batch_size": 8,
        "loop.trackers": "[]",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    assert pretrain.main([f"--{key}={value}" for key, value in words.items()]) == 0
    folder = encoder_run / "export"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(
        model.patch_embed.proj.weight, load_file(folder / "model.safetensors")["patch_embed.proj.weight"]
    )
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (channels, 16, 16) and data["mean"] == pytest.approx((0.449,) * channels)
    assert run_probe("knn", knn__k="[5]") == 0 and result(encoder_run, "knn")["accuracy"] > 0.8
    for method in methods:
        assert run_probe(method, **({} if channels == 1 else {"finetune__rand_augment": "null"})) == 0
    if channels == 5:
        assert run_probe("finetune", name="other") == 2
        assert "finetune.rand_augment is 'rand-m9-mstd0.5-inc1'; it must be null" in capsys.readouterr().err


def test_linear_probe(run_probe, encoder_run):
    before = load_file(encoder_run / "export" / "model.safetensors")
    assert run_probe("linear", linear__epochs=20) == 0
    folder, found = encoder_run / "probe" / "linear", result(encoder_run, "linear")
    assert found["accuracy"] > 0.6, "the pictures are easy"
    assert found["settings"]["lr"] == pytest.approx(30 * 16 / 256) and found["settings"]["epochs"] == 20
    trained = load_file(last_checkpoint(folder) / "model.safetensors")
    frozen = {name.removeprefix("encoder."): t for name, t in trained.items() if name.startswith("encoder.")}
    assert frozen.keys() == before.keys() and all(torch.equal(before[name], frozen[name]) for name in before)
    assert trained["norm.num_batches_tracked"] == 60 * 2, "60 steps of two micro-batches, and no made-up one"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"]["trained"] == 24 * CLASSES + CLASSES
    classifier = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    images, labels = held_out(encoder_run)
    with torch.no_grad():
        right = (classifier(images).argmax(dim=1) == labels).float().mean().item()
    assert right == pytest.approx(found["accuracy"])


def test_the_folded_head_is_norm_and_head():
    torch.manual_seed(0)
    linear = LinearProbe(torch.nn.Identity(), 5, 3)
    for _ in range(4):
        linear(3 + 2 * torch.randn(16, 5))
    x = torch.randn(7, 5)
    weight, bias = linear.folded_head()
    torch.testing.assert_close(F.linear(x, weight, bias), linear.eval()(x))
    assert not linear.train().encoder.training and linear.norm.training


def test_work_is_counted_once_for_what_is_frozen(arguments, encoder_run):
    encoder = find_encoder(encoder_run)
    words = arguments("linear", "finetune")
    config = parse_config(probe.ProbeConfig, words, program="", summary="", plain=probe.WORDS)
    linear = LinearTask(probe.classifier_run(config, encoder, "linear"), encoder)
    whole = FinetuneTask(probe.classifier_run(config, encoder, "finetune"), encoder)
    assert linear.forward_flops_per_sample == pytest.approx(whole.forward_flops_per_sample / 3, rel=1e-4)
    assert probe.classifier_run(config, encoder, "linear").gentler() == ("--linear.blr 15",)


class Crash(BaseException):
    """Ends a run as kill -9 does: nothing is saved on the way out."""


@pytest.mark.slow
def test_fine_tuning_broken_off_and_resumed(run_probe, encoder_run, monkeypatch):
    """Rows of steps behind the last checkpoint are there, and are run again: as if nothing had been."""
    folder, unbroken = encoder_run / "probe" / "finetune", encoder_run / "unbroken"
    assert run_probe("finetune") == 0
    expected = result(encoder_run, "finetune")
    folder.rename(unbroken)
    loss, seen = FinetuneTask.loss, []

    def breaking(self, model, batch):
        seen.append(1)
        if len(seen) == 2 + 2 * 5 + 2:  # two made-up batches, two micro-batches a step, within the sixth step
            raise Crash
        return loss(self, model, batch)

    monkeypatch.setattr(FinetuneTask, "loss", breaking)
    with pytest.raises(Crash):
        run_probe("finetune")
    assert rows(folder)[-1]["step"] == 5
    assert last_checkpoint(folder).name in {"step_00000003", "step_00000004"}, "the later one was being written"
    monkeypatch.setattr(FinetuneTask, "loss", loss)
    assert run_probe("finetune", data__workers=1) == 0
    assert rows(folder) == rows(unbroken)
    ours, theirs = (load_file(last_checkpoint(f) / "model.safetensors") for f in (folder, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {k: v for k, v in result(encoder_run, "finetune").items() if k != "wall_s"} == {
        k: v for k, v in expected.items() if k != "wall_s"
    }
    exported = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in exported.state_dict().items())


def test_a_stop_ends_the_sequence_and_the_same_command_continues(run_probe, encoder_run, monkeypatch):
    assert run_probe("linear") == 0
    expected = load_file(last_checkpoint(encoder_run / "probe/linear") / "model.safetensors")
    (encoder_run / "probe").rename(encoder_run / "unbroken")
    loss, seen = LinearTask.loss, []

    def interrupted(self, model, batch):
        seen.append(1)
        if len(seen) == 2 + 5:  # two made-up batches, two micro-batches a step
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, model, batch)

    monkeypatch.setattr(LinearTask, "loss", interrupted)
    assert run_probe("linear", "knn") == EXIT_STOPPED
    assert not (encoder_run / "probe" / "linear.json").exists() and not (encoder_run / "probe" / "knn.json").exists()
    monkeypatch.setattr(LinearTask, "loss", loss)
    assert run_probe("linear", "knn") == 0
    assert result(encoder_run, "knn")["method"] == "knn"
    found = load_file(last_checkpoint(encoder_run / "probe/linear") / "model.safetensors")
    assert "norm.running_mean" in found and all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("methods", "changed", "told"),
    [
        (["knn"], {"knn__k": "[49]"}, "knn.k is (49,); it must be at most the 48 training samples"),
        (["linear"], {"linear__batch_size": 64}, "linear.batch_size is 64; it must be at most the 48 training"),
        (["linear"], {"train": "{unlabelled}", "val": "{unlabelled}"}, "u1 in {unlabelled} has no label"),
        (["knn"], {"train": "{unlabelled}", "val": "{unlabelled}"}, "u1 in {unlabelled} has no label"),
        (["knn"], {"train": "{few}", "val": "{many}"}, "has label 6, but the labels of {few} end at 5"),
        (["knn"], {"train": "nowhere.tar", "val": "nowhere.tar"}, "'nowhere.tar' does not exist"),
    ],
    ids=["too many neighbours", "a large batch", "no label, trained", "no label", "a class more", "no shards"],
)
def test_what_cannot_work_is_told_in_one_message(run_probe, methods, changed, told, labelled, write_tar, encode, capsys, tmp_path):  # fmt: skip  # noqa: E501
    image = encode(picture(np.random.default_rng(0), 0), "PNG")
    members = [("u0.png", image), ("u0.cls", b"0"), ("u1.png", image), ("u2.png", image)]
    paths = {
        "unlabelled": str(write_tar(tmp_path / "unlabelled.tar", members)),
        "few": str(labelled("few", 30)),
        "many": str(labelled("many", 7, first=1)),
    }
    changed = {key: str(value).format_map(paths) for key, value in changed.items()}
    assert run_probe(*methods, **changed) == 2
    error = capsys.readouterr().err
    assert told.format_map(paths) in error and "Traceback" not in error and error.count("error:") == 1


@pytest.mark.parametrize("pattern", ["{command}", "{tar}::{command}", "{{{tar},{command}}}", "p{{ipe,}}:{touch}"])
def test_commands_of_a_run_folder_are_not_run(run_probe, encoder_run, pattern, tmp_path, capsys):
    """A run folder may come from anybody; the command line is the user's own."""
    data = yaml.safe_load((encoder_run / "config.yaml").read_text())["data"]
    touch = f"touch {tmp_path}/ran; cat {data['train']}"
    pattern = pattern.format(tar=data["train"], touch=touch, command=f"pipe:{touch}")
    for key in ("train", "val"):
        (encoder_run / "config.yaml").write_text(yaml.safe_dump({"name": "run", "data": data | {key: pattern}}))
        for method in ("knn", "linear"):
            assert run_probe(method, knn__k="[5]") == 2
        assert f"data.{key} is " in (told := capsys.readouterr().err) and "give it with --train and --val" in told
    assert not (tmp_path / "ran").exists()
    command = f"pipe:{touch}"
    assert run_probe("knn", knn__k="[5]", train=command, val=command, data__cache_dir=tmp_path / "cache") == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_samples_without_an_image_count(run_probe, encoder_run, method, write_tar, encode, tmp_path, capsys):
    """No batch tells of them: they are not in the index."""
    image = encode(picture(np.random.default_rng(0), 0), "PNG")
    named = {}
    for split in ("train", "val"):
        members = [(f"{split}{i:02}.{kind}", data) for i in range(16) for kind, data in (("png", image), ("cls", b"0"))]
        named[split] = write_tar(tmp_path / f"odd_{split}.tar", [*members, (f"{split}-none.cls", b"0")])
    changed = named | {"knn__k": "[5]", "data__cache_dir": tmp_path / "cache"}
    assert run_probe(method, **changed, data__max_bad_samples=1) == 1
    assert "2 bad samples, more than data.max_bad_samples = 1 allows" in capsys.readouterr().err
    assert run_probe(method, **changed, data__max_bad_samples=2) == 0
    (file,) = (encoder_run / "probe").rglob("*bad_samples.jsonl")
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["train-none", "val-none"]


@pytest.mark.parametrize("method", ["knn", "finetune"])
def test_too_little_shared_memory_is_reported_in_one_message(run_probe, monkeypatch, method, capsys):
    def full(storage):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    assert run_probe(method, data__workers=1, knn__k="[5]") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: data.workers is 1, and a batch of one does not fit") and error.count("\n") == 1


def test_the_limit_of_the_cache_is_the_runs_or_that_of_the_command(
    run_probe, encoder_run, tmp_path, capsys, monkeypatch
):
    """Compressed shards are unpacked in the cache; a limit that two of them exceed is refused."""
    content = yaml.safe_load((encoder_run / "config.yaml").read_text())
    for split in ("train", "val"):
        packed = Path(f"{content['data'][split]}.gz")
        packed.write_bytes(gzip.compress(Path(content["data"][split]).read_bytes()))
        content["data"][split] = str(packed)
    content["data"] |= {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1e-6}
    (encoder_run / "config.yaml").write_text(yaml.safe_dump(content))
    assert run_probe("knn", knn__k="[5]") == 2
    assert "data.cache_gib is 1e-06; allowed: " in capsys.readouterr().err
    opened, limits = labelled_sets.open_index, []
    monkeypatch.setattr(labelled_sets, "open_index", lambda *given: limits.append(given[2]) or opened(*given))
    assert run_probe("knn", knn__k="[5]", data__cache_gib=1) == 0
    assert set(limits) == {1}
    content["data"]["cache_gib"] = math.inf
    (encoder_run / "config.yaml").write_text(yaml.safe_dump(content))
    assert run_probe("knn", knn__k="[5]") == 2 and "data.cache_gib is inf; give a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--loop.micro_batch_size=7"], "loop.micro_batch_size is 7; it must be even"),
        (["--train=a.tar"], "val is None; it must be given with train"),
        (["--linear.epoch=3"], "did you mean linear.epochs?"),
        (["--finetune.warmup_epochs=9"], "finetune.warmup_epochs is 9.0; it must be from 0 to finetune.epochs (3.0)"),
        (["--linear.min_lr=9"], "linear.min_lr is 9.0; it must be from 0 to the peak rate (1.88)"),
        (["--finetune.rand_augment=m9"], "finetune.rand_augment is 'm9'"),
    ],
    ids=["odd pairs", "half the data", "a typo", "warm-up", "rate", "policy"],
)
def test_a_wrong_key_is_told(arguments, changed, told, capsys):
    with pytest.raises(SystemExit) as stop:
        probe.main([*arguments("finetune"), *changed])
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_help(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["probe.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/probe.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("probe.py RUN ...", "--method {knn,linear,finetune}", "--linear.blr", "Labelled held-out shards"):
        assert words in text


def test_only_a_finished_run_has_an_encoder(encoder_run, tmp_path, capsys):
    assert find_encoder(encoder_run / "export") == find_encoder(encoder_run)
    (encoder_run / "export" / "model.safetensors").unlink()
    for folder, told in ((encoder_run, "has not been finished"), (tmp_path / "nothing", "holds no exported encoder")):
        assert probe.main([str(folder)]) == 2
        assert told in capsys.readouterr().err


def test_classes_of_other_names_are_refused(run_probe, tmp_path, capsys, photos):
    """Labels of folders are numbers in the order of their names: of other folders, they mean other things."""
    from moa_vision.shards import make_shards

    for split, names in (("train", "abc"), ("val", "abd"), ("fewer", "ab")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            photos[0].save(tmp_path / split / name / "1.jpg")
        make_shards(str(tmp_path / split), tmp_path / "packed" / split, workers=1)
    packed = tmp_path / "packed"
    assert run_probe("knn", train=packed / "train", val=packed / "val", knn__k="[1]") == 2
    assert "labels mean other classes" in capsys.readouterr().err
    assert run_probe("knn", train=packed / "train", val=packed / "fewer", knn__k="[1]") == 0


def test_several_processes_take_one_trained_method(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for methods in (["knn"], ["linear", "finetune"]):
        assert probe.main(arguments(*methods)) == 2
        assert "in 2 processes; with a launcher it must be one of linear and finetune" in capsys.readouterr().err


def test_the_full_recipe():
    words = ["RUN", f"--config={ROOT / 'configs/probe/imagenet_vit_b16.yaml'}"]
    config = parse_config(probe.ProbeConfig, words, program="", summary="", plain=probe.WORDS)
    linear, tuned = config.linear, config.finetune
    assert (linear.epochs, linear.warmup_epochs, linear.batch_size, linear.blr) == (90, 10, 16384, 0.1)
    assert (linear.weight_decay, linear.min_lr, linear.momentum) == (0, 0, 0.9)
    assert (tuned.epochs, tuned.warmup_epochs, tuned.batch_size, tuned.blr, tuned.min_lr) == (
        100,
        5,
        1024,
        5e-4,
        1e-6,
    )
    assert (tuned.layer_decay, tuned.weight_decay, tuned.drop_path, tuned.betas) == (0.65, 0.05, 0.1, (0.9, 0.999))
    assert (tuned.mixup, tuned.cutmix, tuned.smoothing, tuned.erase) == (0.8, 1.0, 0.1, 0.25)
    assert tuned.rand_augment == "rand-m9-mstd0.5-inc1" and tuned.max_grad_norm is None
