import base64
import json
import math
import shutil

import pytest

from moa_eval.page import formatting
from moa_eval.page.writing import write_page
from moa_eval.training.reading import read_run
from moa_eval.training.report import gallery, training_section

MOA = "vit_tiny_patch4_qdmoa"
pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_section_has_title_verdict_caveats_and_tables(make_run):
    mixing = make_run("b", final=0.4, encoder=MOA, lr=1.2e-3, spread=0.1, probes={"knn": 0.5})
    section = training_section([make_run("a"), mixing])
    assert (section.title, section.template) == ("qd-MoA against SwiGLU", "training")
    assert section.verdict[1] == "One seed: no evidence of a general difference."
    assert section.caveats == ["Peak learning rates differ: 3e-4 (SwiGLU), 1.2e-3 (qd-MoA)."]
    assert [own["label"] for own in section.content["mixing"]] == ["qd-MoA"]
    assert {"losses", "rates", "costs", "probe", "config", "mixing", "train"} <= section.tables.keys()


def test_series_are_grouped_and_coloured_by_method(make_run):
    runs = {("swiglu", 1e-3): 0.5, ("qdmoa", 1e-3): 0.45, ("qdmoa", 2e-3): 0.4, ("qdmoa", 4e-3): 0.5}
    folders = [
        make_run(f"{ffn}{rate}_{seed}", encoder=f"vit_tiny_patch4_{ffn}", lr=rate, seed=seed, final=final, keys=())
        for (ffn, rate), final in runs.items()
        for seed in range(3)
    ]
    series = training_section(folders).series
    assert [(own.group, own.colour) for own in series] == [("SwiGLU", 0)] * 3 + [("qd-MoA", 1)] * 9
    assert [own.shown for own in series] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_gallery_matches_images_by_key(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA, keys=("images/a", "images/b"))]
    shown = training_section(folders).content["gallery"]
    assert [row["key"] for row in shown] == ["images/b", "images/a"] and all(row["pixelated"] for row in shown)
    for run, folder in enumerate(folders):
        for entry in json.loads((folder / "reconstructions/index.json").read_text())["images"]:
            cell = next(row for row in shown if row["key"] == entry["key"])["cells"][run]
            tile = (folder / "reconstructions" / entry["reconstruction"]).read_bytes()
            assert base64.b64decode(cell["reconstruction"].removeprefix("data:image/png;base64,")) == tile
            assert (cell["run"], cell["loss_norm"], cell["step"]) == (run, entry["loss_norm"], 40)


def test_gallery_leaves_cells_of_missing_images_empty(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", keys=("images/a",))), read_run(make_run("c", keys=()))]
    assert [row["key"] for row in gallery(runs[::-1])] == ["images/a"]  # the keys of the first run that has images
    cells = [[cell["reconstruction"] is not None for cell in row["cells"]] for row in gallery(runs)]
    assert cells == [[True, False, False], [True, True, False]]
    assert gallery(runs[2:]) == []


def test_a_baseline_has_no_difference_and_zero_has_no_sign(make_run, tmp_path):
    folders = [make_run("a"), make_run("same", encoder=MOA)]
    shutil.copy(folders[0] / "metrics.jsonl", folders[1])
    section = training_section(folders)
    page = write_page([section], tmp_path / "out", title="Two", command="").read_text()
    baseline, other = section.tables["runs"]
    assert other["final_loss_norm_difference"] == 0 and "0.0000 · 0.00 %" in page
    assert math.isnan(baseline["final_loss_norm_difference"]) and page.count("<small>baseline</small>") >= 4


def test_the_summary_has_evaluators_and_learning_rate_tolerance(make_run, tmp_path):
    folders = [
        make_run(f"{rate}_{seed}", lr=rate, seed=seed, final=final + 1e-4 * seed)
        for rate, final in ((1e-3, 0.51), (2e-3, 0.5), (4e-3, 0.52))
        for seed in (0, 1)
    ]
    for seed, folder in enumerate(folders[2:4]):
        row = {"kind": "eval", "step": 40, "samples": 2560, "epoch": 1, "wall_s": 1, "knn/accuracy": 0.5 + 0.02 * seed}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    section = training_section(folders)
    write_page([section], tmp_path / "out", title="One", command="")
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| knn/accuracy | 0.5100 ± 0.0141 |" in summary
    (row,) = section.tables["tolerance"]
    good = f"{formatting.rate(row['low_good_rate'], 2)} to {formatting.rate(row['high_good_rate'], 2)}"
    span, low, high = (formatting.ratio(row[key]) for key in ("span", "span_low_95", "span_high_95"))
    assert f"| SwiGLU | 2e-3 | {good} | {span} | {low} to {high} | 2 |" in summary
