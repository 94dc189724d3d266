import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest

from moa_eval.training.reading import RunFolderError, find_runs, read_run
from moa_eval.training.runs import split_encoder


def edit_rows(folder, change):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_a_run_is_what_its_files_say(make_run):
    folder = make_run("moa", encoder="vit_tiny_patch4_qdmoa", lr=1.2e-3, seed=3, mixing=500)
    run = read_run(folder)
    assert (run.name, run.seed, run.ffn, run.peak_lr, run.status) == ("moa", 3, "qdmoa", 1.2e-3, "finished")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for kind, columns in (("train", run.train), ("val", run.validation)):
        expected = [row for row in rows if row["kind"] == kind]
        for key, values in columns.items():
            want = [math.nan if row.get(key) is None else row[key] for row in expected]
            np.testing.assert_array_equal(values, want)
    assert run.seen == 40 * 64
    assert (run.counter, run.unit, run.flops_per_unit) == ("samples", "image", 3_005_000)
    assert run.throughput == 120.0
    assert run.training_s == 40 * 64 / 120
    assert run.figure("parameters", "mixing") == 500
    assert [image.key for image in run.reconstructions] == ["images/b", "images/a"]
    assert run.reconstructions_step == 40


def test_a_run_without_summary_is_unfinished_and_its_speed_comes_from_its_rows(make_run):
    run = read_run(make_run(status=None))
    assert run.status == "unfinished"
    assert run.throughput == np.median(100.0 + np.arange(1, 41))
    assert math.isnan(run.figure("parameters", "total"))


def test_stopped_is_reported(make_run):
    assert read_run(make_run(status="stopped")).status == "stopped"


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("spelling", [math.nan, None, math.inf])
def test_a_loss_or_gradient_that_is_no_number_means_diverged(make_run, key, spelling):
    folder = make_run()
    edit_rows(folder, lambda rows: [row | {key: spelling} if row["step"] >= 17 else row for row in rows])
    run = read_run(folder)
    assert run.status == "diverged"
    assert run.diverged_at == 17


def test_the_later_of_two_rows_for_a_step_counts(make_run):
    folder = make_run(steps=10)
    edit_rows(folder, lambda rows: [*rows, rows[3] | {"loss": 0.125}])
    run = read_run(folder)
    assert run.train["step"].tolist() == list(range(1, 11))
    assert run.train["loss"][3] == 0.125


def test_a_last_line_that_is_still_being_written_is_left_out(make_run):
    folder = make_run(steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_run(folder).train["step"]) == 10


def test_other_kinds_of_rows_are_left_alone(make_run):
    folder = make_run(steps=10)
    edit_rows(folder, lambda rows: [{"kind": "mixing", "layer": 3}, *rows])
    assert len(read_run(folder).train["step"]) == 10


def test_a_language_run_counts_tokens_and_has_one_loss(make_run):
    folder = make_run("lm", ffn="qdmoa", final=3.0)
    run = read_run(folder)
    assert (run.kind.name, run.ffn, run.counter, run.unit) == ("language model", "qdmoa", "tokens", "token")
    assert run.losses == {"loss": "cross-entropy"}
    assert (run.seen, run.flops_per_unit, run.reconstructions) == (40 * 64, 3_000_000, ())
    assert set(run.validation) == {"step", "tokens", "loss", "wall_s", "epoch"}
    edit_rows(folder, lambda rows: [{k: v for k, v in row.items() if k != "tokens"} for row in rows])
    with pytest.raises(RunFolderError, match="has no number 'tokens'"):
        read_run(folder)


def test_probes_are_read_by_name(make_run):
    run = read_run(make_run(probes={"linear": 0.625, "knn-imagenet": 0.5, "knn": 0.25}))
    assert [(probe.name, probe.method, probe.accuracy) for probe in run.probes] == [
        ("knn-imagenet", "knn", 0.5), ("knn", "knn", 0.25), ("linear", "linear", 0.625),
    ]  # fmt: skip
    assert math.isnan(run.probes[0].top5)
    assert (run.probes[0].step, run.probes[0].val_samples, run.probes[0].settings) == (40, 100, {"k": 20})


def test_a_folder_of_run_folders_stands_for_its_runs(make_run):
    folders = [make_run("b"), make_run("a"), make_run("c")]
    sweep = folders[0].parent
    (sweep / "logs").mkdir()
    assert find_runs(sweep) == [sweep / "a", sweep / "b", sweep / "c"]
    assert find_runs(folders[0]) == folders[:1]
    with pytest.raises(
        RunFolderError, match=r"logs: neither a run folder nor a folder of run folders; is config\.yaml"
    ):
        find_runs(sweep / "logs")


def test_a_run_may_have_no_rows_and_no_images_yet(make_run):
    folder = make_run(status=None)
    (folder / "metrics.jsonl").write_text("")
    shutil.rmtree(folder / "reconstructions")
    run = read_run(folder)
    assert (run.seen, run.diverged_at, run.reconstructions) == (0, None, ()) and math.isnan(run.training_s)


def replace(name, old, new):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def png_header(side):
    """The beginning of a PNG of side x side pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


FAULTS = {  # what is done to the folder -> the file and the words that the message must have
    "no folder": (shutil.rmtree, "", "no such folder"),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml", "missing"),
    "no metrics": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl", "missing"),
    "no environment": (lambda folder: (folder / "env.json").unlink(), "env.json", "missing"),
    "bad yaml": (replace("config.yaml", "name: baseline", "name: [baseline"), "config.yaml", "not valid YAML"),
    "number": (replace("config.yaml", "seed: 0", f"seed: 0\nx: 1{':9' * 4000}.0"), "config.yaml", "not valid YAML"),
    "no seed": (replace("config.yaml", "seed: 0", "sead: 0"), "config.yaml", "no usable seed"),
    "no rate": (replace("config.yaml", "lr: 0.0003", "lr: fast"), "config.yaml", "no usable optim.lr"),
    "no model": (replace("config.yaml", "encoder:", "encodr:"), "config.yaml", "no usable model.encoder"),
    "bad line": (replace("metrics.jsonl", '"kind"', "kind"), "metrics.jsonl", "line 1 is not valid JSON"),
    "no kind": (replace("metrics.jsonl", '"kind"', '"kid"'), "metrics.jsonl", "line 1 has no 'kind'"),
    "no column": (replace("metrics.jsonl", '"samples"', '"tokens"'), "metrics.jsonl", "has no number 'samples'"),
    "text": (replace("metrics.jsonl", '"samples": 64', '"samples": "64"'), "metrics.jsonl", "found '64'"),
    "truth": (replace("metrics.jsonl", '"lr": 0.0001', '"lr": true'), "metrics.jsonl", "found True"),
    "two runs": (replace("metrics.jsonl", '"samples": 64,', '"samples": 9999,'), "metrics.jsonl", "'samples' falls"),
    "cut json": (lambda folder: (folder / "summary.json").write_text('{"a"'), "summary.json", "not valid JSON"),
    "list": (lambda folder: (folder / "env.json").write_text("[]"), "env.json", "holds a list"),
    "binary": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe"), "config.yaml", "cannot be read"),
    "no tile": (
        lambda folder: (folder / "reconstructions/01_masked.png").unlink(),
        "reconstructions/01_masked.png",
        "missing, but index.json lists it",
    ),
    "no png": (
        lambda folder: (folder / "reconstructions/00_original.png").write_bytes(b"GIF89a"),
        "reconstructions/00_original.png",
        "not a readable PNG",
    ),
    "huge png": (
        lambda folder: (folder / "reconstructions/00_original.png").write_bytes(png_header(60_000)),
        "reconstructions/00_original.png",
        "not a readable PNG",
    ),
    "outside": (
        replace("reconstructions/index.json", "00_original.png", "../../other/00_original.png"),
        "reconstructions/index.json",
        "not a plain file name",
    ),
    "no key": (replace("reconstructions/index.json", '"key"', '"kee"'), "reconstructions/index.json", "has no 'key'"),
    "probe without accuracy": (
        replace("probe/knn.json", '"accuracy"', '"acuracy"'), "probe/knn.json", "has no 'accuracy'",
    ),
    "probe with text": (replace("probe/knn.json", "0.5", '"half"'), "probe/knn.json", "wrong type"),
    "no list": (
        lambda folder: (folder / "reconstructions/index.json").write_text('{"step": 1, "images": 2}'),
        "reconstructions/index.json",
        "wrong type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_gives_one_line_that_names_the_file(make_run, fault):
    change, file, words = FAULTS[fault]
    folder = make_run(probes={"knn": 0.5})
    change(folder)
    with pytest.raises(RunFolderError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}: ")
    assert words in message
    assert "\n" not in message
    assert message.count("; ") >= 1  # what is wrong; what to do


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vit_base_patch16_qdmoa", ("vit_base_patch16", 16, "qdmoa")),
        ("vit_tiny_patch4_swiglu", ("vit_tiny_patch4", 4, "swiglu")),
        ("resnet50", ("resnet50", None, "resnet50")),
    ],
)
def test_an_encoder_name_is_size_patch_and_ffn(name, parts):
    assert split_encoder(name) == parts
