"""Reading of run folders."""

import json
import math
import shutil

import numpy as np
import pytest

from moa_eval.training.reading import find_runs, read_run
from moa_train.errors import DataError


def edit_rows(folder, change):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_a_run_has_the_values_of_its_files(make_run):
    folder = make_run("moa", encoder="vit_tiny_patch4_qdmoa", lr=1.2e-3, seed=3, mixing=500)
    run = read_run(folder)
    assert (run.name, run.seed, run.ffn, run.peak_lr, run.status) == ("moa", 3, "qdmoa", 1.2e-3, "finished")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for kind, columns in (("train", run.train), ("val", run.validation)):
        for key, values in columns.items():
            expected = [row.get(key) for row in rows if row["kind"] == kind]
            np.testing.assert_array_equal(values, np.array(expected, dtype=float))
    assert (run.seen, run.end, run.throughput, run.training_s) == (40 * 64, 40 * 64, 120.0, 40 * 64 / 120)
    assert (run.flops_per_unit, run.number("parameters", "mixing")) == (3_005_000, 500)
    assert [image.key for image in run.reconstructions] == ["images/b", "images/a"]
    assert run.reconstructions_step == 40


def test_a_run_without_summary_is_unfinished_and_has_the_throughput_of_its_rows(make_run):
    run = read_run(make_run(status=None))
    assert run.status == "unfinished"
    assert run.throughput == np.median(100.0 + np.arange(1, 41))
    assert math.isnan(run.number("parameters", "total"))


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, None, math.inf])
def test_a_non_finite_loss_or_gradient_means_diverged(make_run, key, value):
    folder = make_run()
    edit_rows(folder, lambda rows: [row | {key: value} if row["step"] >= 17 else row for row in rows])
    run = read_run(folder)
    assert (run.status, run.diverged_at) == ("diverged", 17)


def test_the_later_row_of_a_step_counts(make_run):
    folder = make_run(steps=10)
    edit_rows(folder, lambda rows: [*rows, rows[3] | {"loss": 0.125}])
    run = read_run(folder)
    assert run.train["step"].tolist() == [*range(1, 11)]
    assert run.train["loss"][3] == 0.125


def test_an_incomplete_last_line_is_ignored(make_run):
    folder = make_run(steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_run(folder).train["step"]) == 10


def test_probes_are_read_by_name(make_run):
    run = read_run(make_run(probes={"linear": 0.625, "knn-imagenet": 0.5, "knn": 0.25}))
    assert [(probe["probe"], probe["probe_method"], probe["accuracy"]) for probe in run.probes] == [
        ("knn-imagenet", "knn", 0.5), ("knn", "knn", 0.25), ("linear", "linear", 0.625),
    ]  # fmt: skip
    assert math.isnan(run.probes[0]["top5"]) and run.probes[0]["settings"] == '{"k": 20}'


def test_a_sweep_folder_stands_for_its_run_folders(make_run):
    folders = [make_run("b"), make_run("a")]
    sweep = folders[0].parent
    (sweep / "logs").mkdir()
    assert find_runs(sweep) == [sweep / "a", sweep / "b"]
    assert find_runs(folders[0]) == folders[:1]
    with pytest.raises(DataError, match=r"logs: neither a run folder nor a folder of run folders; is config\.yaml"):
        find_runs(sweep / "logs")


def test_a_run_may_have_neither_rows_nor_images(make_run):
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


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def unlink(name):
    return lambda folder: (folder / name).unlink()


FAULTS = {  # change to the folder, file and words of the message
    "no folder": (shutil.rmtree, "", "no such folder"),
    "no seed": (replace("config.yaml", "seed: 0", "sead: 0"), "config.yaml", "'seed' is a required property"),
    "text as rate": (replace("config.yaml", "lr: 0.0003", "lr: fast"), "config.yaml", "optim.lr has the wrong format"),
    "bad line": (replace("metrics.jsonl", '"kind"', "kind"), "metrics.jsonl", "line 1 is no metrics row"),
    "no column": (replace("metrics.jsonl", '"samples"', '"tokens"'), "metrics.jsonl", "'samples' is missing"),
    "two runs": (replace("metrics.jsonl", '"samples": 64,', '"samples": 9999,'), "metrics.jsonl", "'samples' falls"),
    "no tile": (unlink("reconstructions/01_masked.png"), "reconstructions/01_masked.png", "not a readable PNG"),
    "no png": (write("reconstructions/00_original.png", "GIF89a"), "reconstructions/00_original.png", "not a readable"),
    "outside": (
        replace("reconstructions/index.json", "00_original.png", "../../other/00_original.png"),
        "reconstructions/index.json",
        "not a plain file name",
    ),
    "no key": (
        replace("reconstructions/index.json", '"key"', '"kee"'), "reconstructions/index.json", "images.0 has",
    ),
    "probe": (replace("probe/knn.json", "0.5", '"half"'), "probe/knn.json", "accuracy has the wrong format"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_file_is_named_in_one_line_with_a_remedy(make_run, fault):
    change, file, words = FAULTS[fault]
    folder = make_run(probes={"knn": 0.5})
    change(folder)
    with pytest.raises(DataError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / file)) and words in message
    assert "\n" not in message and "; " in message
