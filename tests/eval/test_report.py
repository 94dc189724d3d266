import base64
import csv
import io
import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_eval.training.report import write_report

MOA = "vit_tiny_patch4_qdmoa"
SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The page as a browser's parser meets it; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag] = self.text.get(tag, "") + data


def metrics(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def table(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, write_run_into):
    """Two runs and their report."""
    root = tmp_path_factory.mktemp("pair")
    folders = [
        write_run_into(root, "a", final=0.5),
        write_run_into(root, "b", final=0.4, encoder=MOA, lr=1.2e-3, mixing=6000, keys=("images/a", "images/b")),
    ]
    page = write_report(folders, root / "out", title="Runs <a> & b").page
    return folders, page.parent


def test_losses_are_those_of_the_rows(pair):
    folders, out = pair
    rows = table(out, "losses")
    assert [row["name"] for row in rows] == ["a", "b"]
    for loss in ("loss_norm", "loss_pixel"):
        values = [np.array([row[loss] for row in metrics(folder, "val")]) for folder in folders]
        for kind, pick in (("final", lambda v: v[-1]), ("best", np.min)):
            for row, own in zip(rows, values, strict=True):
                difference = pick(own) - pick(values[0])
                assert float(row[f"{kind}_{loss}"]) == pick(own)
                assert float(row[f"{kind}_{loss}_difference"]) == difference
                assert float(row[f"{kind}_{loss}_relative"]) == difference / pick(values[0])


def test_curves_are_those_of_the_rows(pair):
    folders, out = pair
    for kind, name, keys in (("val", "validation", ("loss_norm", "loss_pixel")), ("train", "train", ("loss", "lr"))):
        rows = table(out, name)
        expected = [row for folder in folders for row in metrics(folder, kind)]
        assert [int(row["samples"]) for row in rows] == [row["samples"] for row in expected]
        for key in keys:
            assert [float(row[key]) for row in rows] == [row[key] for row in expected]


def test_costs_are_those_of_the_summaries_and_their_ratios(pair):
    first, second = table(pair[1], "costs")
    assert (first["parameters"], second["parameters"]) == ("1000000.0", "1006000.0")
    assert float(second["parameters_ratio"]) == 1.006
    assert float(second["training_flops_per_image_ratio"]) == 3_060_000 / 3_000_000
    assert (second["mixing_parameters"], float(second["mixing_share"])) == ("6000.0", 6000 / 1_006_000)
    assert (first["images_per_s"], first["peak_memory_mib"], first["training_time_s"]) == ("120.0", "512.0", "20.0")


def test_only_differing_keys_are_listed(pair):
    rows = table(pair[1], "config")
    assert [(row["key"], row["kind"]) for row in rows] == [
        ("name", "identity"), ("optim.lr", "peak rate"), ("model.encoder", "FFN"),
    ]  # fmt: skip
    assert (rows[1]["SwiGLU"], rows[1]["qd-MoA"]) == ("3e-4", "1.2e-3")


def test_every_figure_has_its_files(pair):
    for name in ("validation_loss", "validation_difference", "train_loss", "validation_loss_time"):
        for ending in ("svg", "png"):
            assert (pair[1] / "figures" / f"{name}.{ending}").stat().st_size > 1000


def test_the_page_is_well_formed_and_loads_nothing(pair):
    out = pair[1]
    text = (out / "index.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if source := attributes.get("src"):
            assert source.startswith("data:image/png;base64,")
            assert attributes["alt"]
        if target := attributes.get("href"):
            if target.startswith("#"):
                assert target[1:] in ids
            else:
                assert tag == "a" and (out / target).is_file()


def test_text_from_the_runs_is_escaped(pair):
    page = Page((pair[1] / "index.html").read_text())
    assert page.text["title"] == "Runs <a> & b"
    assert "python pretrain_mae.py --name a --x '<&>'" in page.text["pre"]


def test_images_are_matched_by_key_and_unchanged(pair):
    folders, out = pair
    images = [a for tag, a in Page((out / "index.html").read_text()).tags if tag == "img"]
    shown = {a["alt"]: base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for a in images}
    assert len(shown) == len(images) == 2 * 4
    for folder, label in zip(folders, ("SwiGLU", "qd-MoA"), strict=True):
        for entry in json.loads((folder / "reconstructions/index.json").read_text())["images"]:
            tile = (folder / "reconstructions" / entry["reconstruction"]).read_bytes()
            assert shown[f"{entry['key']}, reconstructed by {label}"] == tile
    with Image.open(io.BytesIO(shown["images/b, masked"])) as image:
        assert image.size == (16, 16)


def test_the_summary_has_the_verdict_and_the_tables(pair):
    text = (pair[1] / "summary.md").read_text()
    assert text.startswith("# Runs <a> & b\n\n**qd-MoA is ")
    assert "One seed: not evidence of a general difference." in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_the_same_runs_give_the_same_bytes(pair, tmp_path):
    folders, out = pair
    write_report(folders, tmp_path / "again", title="Runs <a> & b")
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for file in files:
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_one_run_is_reported_alone(make_run, tmp_path):
    page = write_report([make_run("only")], tmp_path / "out").page
    assert "there is nothing to compare it with" in page.read_text()
    Page(page.read_text())


def test_diverged_unfinished_and_empty_runs_are_shown_and_marked(make_run, tmp_path):
    empty = make_run("empty", encoder="vit_tiny_patch4_moa", status=None, keys=())
    (empty / "metrics.jsonl").write_text("")
    folders = [
        make_run("a"),
        make_run("nan", encoder=MOA, nan_from=25, keys=("images/a",)),
        make_run("cut", encoder="vit_tiny_patch4_gelu", steps=20, status="stopped"),
        empty,
    ]
    text = write_report(folders, tmp_path / "out").page.read_text()
    Page(text)
    for status in ("diverged", "stopped", "unfinished"):
        assert f'<span class="badge {status}">{status}</span>' in text
    assert "Not comparable as they stand" in text
    assert text.count("not recorded") == 1 + 2
    rows = table(tmp_path / "out", "losses")
    assert [row["final_loss_norm"] for row in rows][1] == "nan"
    assert float(rows[1]["best_loss_norm"]) == min(row["loss_norm"] for row in metrics(folders[1], "val")[:2])
    assert rows[3]["samples"] == "0"


def test_seeds_get_their_own_table(make_run, tmp_path):
    folders = [
        make_run(f"{encoder}{seed}", encoder=f"vit_tiny_patch4_{encoder}", seed=seed)
        for encoder in ("swiglu", "moa")
        for seed in (0, 1)
    ]
    text = write_report(folders, tmp_path / "out").page.read_text()
    assert "Over seeds" in text
    finals = [metrics(folder, "val")[-1]["loss_norm"] for folder in folders]
    row = table(tmp_path / "out", "seeds")[0]
    assert (row["arm"], row["baseline"], row["loss"], row["seeds"]) == ("MoA", "SwiGLU", "loss_norm", "2")
    assert float(row["mean"]) == pytest.approx(np.mean(finals[2:]), rel=1e-12)
    assert float(row["standard_deviation"]) == pytest.approx(np.std(finals[2:], ddof=1), rel=1e-12)
    assert float(row["difference"]) == pytest.approx(np.mean(finals[2:]) - np.mean(finals[:2]), rel=1e-9)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script; return its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return (caught.value.code, *capsys.readouterr())

    return run


def test_the_command_prints_the_verdict_and_where_the_page_is(make_run, tmp_path, command):
    code, out, err = command(make_run("a"), "--out", tmp_path / "out", "--title", "Mine")
    *verdict, page = out.splitlines()
    assert (code, page, err) == (0, str(tmp_path / "out" / "index.html"), "")
    assert "".join(verdict) in (tmp_path / "out" / "summary.md").read_text().replace("**", "")
    assert "<h1>Mine</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_the_command_refuses_in_one_line(make_run, tmp_path, command):
    good, other = make_run("a"), make_run("b", changes={"data.val": "other"})
    file = tmp_path / "file"
    file.write_text("")
    for arguments, words in (
        ((tmp_path / "gone", "--out", tmp_path / "out"), "gone: no such folder"),
        ((good, other, "--strict", "--out", tmp_path / "out"), "not comparable: data.val"),
        ((good, good, "--out", tmp_path / "out"), "given 2 times"),
        ((good, "--out", file), str(file)),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("compare_runs.py: error: ") and words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
