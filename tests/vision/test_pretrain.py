"""Whole small pre-training runs: what they leave, exact resume, and errors."""

import json
import multiprocessing
import re
import time

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

from moa_eval.training.reading import read_run
from moa_train.config import parse_config
from moa_train.signals import EXIT_STOPPED
from moa_vision.export import load_mae
from moa_vision.mae import parameter_counts
from moa_vision.pretrain import MAEConfig, MAETask, main
from moa_vision.probe.command import main as probe_main
from moa_vision.probe.evaluator import knn_evaluator

TIMINGS = ("wall_s", "throughput", "mfu")


@pytest.fixture
def arguments(tmp_path, shards, write_tar, photos, encode, small_run):
    """arguments(name, **changed) -> command line of a run of 12 steps, 4 per epoch, with stochastic depth."""
    write_tar(tmp_path / "held-out.tar", [(f"{i}.jpg", encode(photo)) for i, photo in enumerate(photos)])

    def arguments(name="run", **changed):
        data = {"data__train": shards, "data__val": tmp_path / "held-out.tar"}
        schedule = {"schedule__epochs": 3, "schedule__warmup_epochs": 1}
        often = {"loop__val_every": 5, "checkpoint__interval": 5, "loop__num_diagnostic_samples": 3}
        changed = {"encoder_args": {"drop_path_rate": 0.3}, **data, **schedule, **often, **changed}
        return small_run(name=name, **changed)

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    """train(name, **changed) -> exit code and run folder."""

    def train(name="run", **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(arguments(name, **changed)), tmp_path / "runs" / name

    return train


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def weights(folder):
    tensors = load_file(folder / "checkpoints" / "step_00000012" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_run_folder_is_complete(train):
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
    summary = record.summary
    assert summary["parameters"] == parameter_counts(load_mae(folder / "export"))
    assert summary["bad_samples"] == 0 and summary["samples"] == 96 and summary["flops_per_sample"] % 3 == 0
    assert not list(folder.rglob(".*"))


def test_variants_share_initial_weights(arguments):
    def parameters(variant: str, seed: int) -> dict[str, torch.Tensor]:
        config = parse_config(
            MAEConfig, arguments(model__encoder=f"vit_tiny_patch16_{variant}", seed=seed), program="", summary=""
        )
        return dict(MAETask(config).model.named_parameters())

    swiglu, qdmoa, other = parameters("swiglu", 3), parameters("qdmoa", 3), parameters("swiglu", 4)
    assert swiglu.keys() < qdmoa.keys()
    assert all(torch.equal(value, qdmoa[name]) for name, value in swiglu.items())
    assert all(not torch.equal(v, other[name]) for name, v in swiglu.items() if v.requires_grad and v.std() > 0)


def test_validation_loss_is_the_mean_over_images(train, arguments):
    _, folder = train(loop__micro_batch_size=3, schedule__epochs=1, schedule__batch_size=6, schedule__warmup_epochs=0)
    mae = load_mae(folder / "export").eval()
    config = parse_config(MAEConfig, arguments(loop__num_diagnostic_samples=4), program="", summary="")
    task = MAETask(config)
    batch = task._diagnostic_batch
    assert batch is not None and len(batch.images) == 4
    images = task.normalized(batch.images)
    with torch.no_grad():
        one_by_one = [mae(images[i : i + 1], batch.noise[i : i + 1]).loss.item() for i in range(4)]
    assert rows(folder)[-1]["loss"] == pytest.approx(sum(one_by_one) / 4, rel=1e-5)


def test_resume_is_bit_exact(train, stopping):
    _, unbroken = train("unbroken")
    folder = unbroken.with_name("run")
    for stop in (4, 9):  # at the end of an epoch, and within one
        with stopping(stop):
            code, _ = train("run")
        assert code == EXIT_STOPPED
        assert json.loads((folder / "summary.json").read_text())["steps"] == stop
    assert train("run")[0] == 0
    assert rows(folder) == rows(unbroken)
    assert weights(folder) == weights(unbroken)


@pytest.mark.slow
def test_kill_9_with_workers_leaves_no_process_and_resumes_exactly(train, arguments, tmp_path):
    """SIGKILL of the training process only; the loader's workers must end by themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moa_vision.pretrain"])
    changed, survivors, folder = {"data__workers": 2, "checkpoint__interval": 2}, [], tmp_path / "runs" / "run"
    metrics = folder / "metrics.jsonl"
    for steps in (1, 4, 5, 7, 10, 11):
        process = context.Process(target=main, args=(arguments("run", **changed),))
        process.start()
        while not metrics.exists() or len(rows(folder)) < steps:
            assert process.is_alive()
            time.sleep(0.005)
        survivors += psutil.Process(process.pid).children()
        process.kill()
        process.join()
    _, alive = psutil.wait_procs(survivors, timeout=60)
    assert not alive
    assert train("run", **changed)[0] == train("unbroken", **changed)[0] == 0
    assert rows(folder) == rows(folder.parent / "unbroken")
    assert weights(folder) == weights(folder.parent / "unbroken")


def test_bad_samples_are_recorded_and_limited(train, shards, write_tar, photos, encode, capsys):
    good, cut = (encode(photos[i]) for i in (0, 1))
    write_tar(shards / "f.tar", [("f0.jpg", good), ("f1.jpg", cut[: len(cut) // 2]), ("f2.jpg", b"no image")])
    code, folder = train()
    assert code == 0
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(sample["key"] for sample in bad) == ["f1", "f2"]
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == 2
    code, _ = train("strict", data__max_bad_samples=1, data__workers=1)
    error = capsys.readouterr().err
    assert code and ("f1" in error or "f2" in error)
    assert error.startswith("error: ") and "Traceback" not in error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__train": "data/photographs/train"}, "python -m moa_vision.photographs --out data/photographs"),
        ({"model__mask_ratio": 0.999}, "mask_ratio=0.999"),
    ],
)
def test_errors_are_one_line(train, changed, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, folder = train(**changed)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error and "Traceback" not in error and error.count("error:") == 1
    assert not folder.exists()


@pytest.fixture
def labelled(tmp_path, write_tar, photos, encode):
    """labelled(name, first) -> a tar of 16 rotated photographs whose labels are their numbers."""

    def labelled(name, first):
        members = []
        for number in range(first, first + 16):
            photo = photos[number % len(photos)].rotate(7 * number)
            members += [(f"{number}.jpg", encode(photo)), (f"{number}.cls", str(number % len(photos)).encode())]
        return str(write_tar(tmp_path / f"{name}.tar", members))

    return labelled


def test_knn_evaluator_gives_the_accuracy_of_the_probe(arguments, labelled, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    train, val, folder = labelled("neighbours", 0), labelled("queries", 16), tmp_path / "runs" / "run"
    given = {"knn": {"interval": 5, "train": train, "val": val, "k": 3}}
    assert main(arguments(evaluators=json.dumps(given)), evaluators={"knn": knn_evaluator}) == 0
    found = [row for row in rows(folder) if row["kind"] == "eval"]
    assert [row["step"] for row in found] == [5, 10, 12]
    words = ["--method", "knn", "--train", train, "--val", val, "--knn.k", "[3]", "--data.workers", "0"]
    assert probe_main([str(folder), *words]) == 0
    accuracy = json.loads((folder / "probe/knn.json").read_text())["accuracy"]
    assert 0 < found[-1]["knn/accuracy"] == accuracy < 1
    assert list(read_run(folder).evaluations["knn/accuracy"]["value"]) == [row["knn/accuracy"] for row in found]


@pytest.mark.parametrize(
    ("evaluators", "message"),
    [
        ({"fid": {"interval": 1}}, "evaluators.fid .* must be an evaluator of knn"),
        ({"knn": {"train": "a", "val": "b"}}, "evaluators.knn.interval is None"),
        ({"knn": {"interval": 1, "train": "a"}}, "evaluators.knn: missing a required argument: 'val'"),
        ({"knn": {"interval": 1, "train": "a", "val": "b", "kk": 3}}, "unexpected keyword argument 'kk'"),
    ],
)
def test_wrong_evaluators_are_one_line(arguments, evaluators, message, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(evaluators=json.dumps(evaluators)), evaluators={"knn": knn_evaluator}) == 2
    assert re.search(message, capsys.readouterr().err)
