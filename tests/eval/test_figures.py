"""Content of the figures of training runs."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import vl_convert
from scipy import stats

from moa_eval.page.charts import PALETTE
from moa_eval.training import figures
from moa_eval.training.curves import smooth
from moa_eval.training.grouping import compare
from moa_eval.training.mixing_maps import mixing_content
from moa_eval.training.reading import read_run
from moa_eval.training.tables import make_tables

MOA = "vit_tiny_patch4_qdmoa"
SVG = "{http://www.w3.org/2000/svg}"
RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)


def draw(folders):
    comparison = compare([read_run(folder) for folder in folders])
    return comparison, figures.draw_all(comparison)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, write_run_into):
    """Two runs, one of which diverges."""
    root = tmp_path_factory.mktemp("pair")
    return draw([write_run_into(root, "a", steps=120), write_run_into(root, "b", steps=120, encoder=MOA, nan_from=95)])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, write_run_into):
    """Two FFNs at four rates with two seeds; the highest rate of one diverges, that of the other is far worse."""
    root, folders = tmp_path_factory.mktemp("sweep"), []
    for encoder, finals in (("vit_tiny_patch4_swiglu", (0.56, 0.54, 0.53, 3.0)), (MOA, (0.55, 0.52, 0.53, 0.5))):
        for rate, final in zip(RATES, finals, strict=True):
            for seed in (0, 1):
                diverges = encoder == MOA and rate == RATES[-1]
                folders.append(
                    write_run_into(
                        root, f"{encoder}{rate}{seed}", encoder=encoder, lr=rate, seed=seed, final=final,
                        nan_from=30 if diverges else None, spread=0.1 if encoder == MOA else None,
                        probes={"knn": 0.5 + 0.1 * (encoder == MOA) + 0.01 * seed},
                    )
                )  # fmt: skip
    return draw(folders)


def rows(chart, *columns):
    """Return the rows of a chart's data that have these columns."""
    return [row for values in chart.spec["datasets"].values() for row in values if set(columns) <= set(row)]


def svg(chart):
    return vl_convert.vegalite_to_svg(chart.spec | {"width": 560})


def paths(svg, kind):
    """Return the SVG paths of one kind of mark with their colours."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    own = [group for group in groups if f"mark-{kind} role-mark" in group.get("class", "")]
    return [(path.get("stroke") or path.get("fill"), path) for group in own for path in group.iter(f"{SVG}path")]


def test_a_curve_passes_through_its_values(pair):
    """Both coordinates of the path's vertices are linear in the values."""
    comparison, charts = pair
    run = comparison.runs[0]
    (path,) = [path for colour, path in paths(svg(charts["validation_loss"]), "line") if colour == PALETTE[0][0]]
    points = np.array([[float(x) for x in pair] for pair in re.findall(r"[ML]([-\d.e]+),([-\d.e]+)", path.get("d"))])
    for axis, column, direction in ((0, "samples", 1), (1, "loss_norm", -1)):
        values = run.validation[column][1:]  # the steep first tenth is left out
        slope, offset = np.polyfit(values, points[:, axis], 1)
        assert np.sign(slope) == direction
        np.testing.assert_allclose(points[:, axis], slope * values + offset, atol=0.01)


@pytest.mark.parametrize(
    ("name", "last"), [("validation_loss_time", 120 * 64 / 120), ("validation_loss_flops", 120 * 64 * 3e6)]
)
def test_time_and_flops_are_those_of_the_cost_table(pair, name, last):
    assert max(row["x"] for row in rows(pair[1][name], "run", "x") if row["run"] == 0) == pytest.approx(last, rel=1e-4)


def test_the_steep_beginning_and_diverging_runs_are_left_out(pair):
    comparison, charts = pair
    late = [own.validation["loss_norm"][own.validation["samples"] >= 0.1 * 64 * 120] for own in comparison.runs]
    drawn = rows(charts["validation_loss"], "run", "x", "y")
    assert min(row["x"] for row in drawn) == 64 * 20
    assert max(row["y"] for row in drawn) == pytest.approx(late[0].max(), rel=1e-5)
    assert comparison.runs[0].validation["loss_norm"][0] > 1.05 * late[0].max()


def test_a_cross_marks_where_a_run_diverged(pair):
    (end,) = rows(pair[1]["validation_loss"], "diverged")
    assert (end["run"], end["x"], end["diverged"]) == (1, 64 * 90, "95")


def test_differences_are_taken_at_equal_images(pair):
    comparison, charts = pair
    a, b = (run.validation["loss_norm"] for run in comparison.runs)
    expected = dict(zip(comparison.runs[0].validation["samples"], b - a, strict=True))
    found = rows(charts["validation_difference"], "run", "y")
    assert {row["run"] for row in found} == {1} and len({row["x"] for row in found}) == np.isfinite(b[1:]).sum()
    assert all(row["y"] == pytest.approx(expected[row["x"]], rel=1e-4) for row in found)


def test_missing_data_gives_no_figure(make_run):
    assert "validation_difference" not in draw([make_run("a")])[1]
    folder = make_run("empty", status=None)
    (folder / "metrics.jsonl").write_text("")
    assert draw([folder])[1] == {}


def test_language_models_have_tokens_and_cross_entropy(make_run):
    charts = draw([make_run("a", ffn="swiglu"), make_run("b", ffn="qdmoa")])[1]
    assert charts["validation_loss"].title == "Validation loss, cross-entropy"
    assert "tokens seen" in svg(charts["validation_loss"]) and "validation_loss_pixel" not in charts


def test_a_run_started_from_a_checkpoint_is_drawn_from_there_on(make_run):
    folders = [make_run("a", ffn="swiglu", steps=60), make_run("b", ffn="qdmoa", steps=60, spread=0.1)]
    path = folders[1] / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["step"] > 30))
    comparison, charts = draw(folders)
    assert [run.seen for run in comparison.runs] == [60 * 64] * 2 and comparison.incomparable == ()
    for name in ("validation_loss", "validation_difference"):
        assert [row["x"] for row in rows(charts[name], "x") if row["run"] == 1] == [2560, 3200, 3840]


def test_runs_at_other_learning_rates_are_hidden_at_first(sweep):
    comparison, charts = sweep
    hidden = next(own["value"] for own in charts["validation_loss"].spec["params"] if own["name"] == "hidden")
    assert hidden == comparison.hidden and len(hidden) == 12
    assert len(paths(svg(charts["validation_loss"]), "line")) == 4


def test_the_learning_rate_figure_has_every_run_once(sweep):
    comparison, charts = sweep
    seeds = rows(charts["loss_against_rate"], "seed")
    assert [(row["rate"], row["seed"]) for row in seeds] == [(run.peak_lr, run.seed) for run in comparison.runs]
    for row, run in zip(seeds, comparison.runs, strict=True):
        if run.diverged_at is not None:
            assert row["diverged"] and row["text"] == "diverged at step 30"
        else:
            assert row["loss"] == pytest.approx(run.validation["loss_norm"][-1], rel=1e-5)
    means = rows(charts["loss_against_rate"], "best")
    limit = charts["loss_against_rate"].spec["layer"][0]["encoding"]["y"]["scale"]["domainMax"]
    outside = {(row["group"], row["rate"]) for row in means if row["loss"] > limit}
    assert outside == {(0, 2.4e-3)}, "one bad rate must not flatten the others"
    assert [(row["group"], row["rate"]) for row in means if row["best"]] == [(0, 1.2e-3), (1, 6e-4)]


def test_an_unfinished_run_is_marked_and_excluded_from_the_mean(make_run):
    folders = [make_run("a", lr=1e-3), make_run("b", lr=2e-3, final=0.45)]
    folders.append(make_run("c", lr=2e-3, seed=1, steps=30, status=None))
    chart = draw(folders)[1]["loss_against_rate"]
    assert [row["early"] for row in rows(chart, "seed")] == [False, False, True]
    assert rows(chart, "seed")[2]["text"].replace("\u202f", "").endswith(", unfinished: 1920 images")
    assert [row["loss"] for row in rows(chart, "best")] == [row["loss"] for row in rows(chart, "seed")[:2]]


def test_terms_have_the_same_colours_in_figures_and_maps(make_run):
    folder = make_run("a", encoder=MOA, spread=0.1)
    terms = [f"f{index}·id" for index in range(len(PALETTE) + 3)]
    for path in (folder / "mixing").glob("step_*.json"):
        content = json.loads(path.read_text())
        for layer in content["layers"]:
            layer["coefficients"] = terms
            layer |= {key: [0.1] * len(terms) for key in ("mean", "std", "low", "high", "share")}
        path.write_text(json.dumps(content))
    (folder / "mixing/index.json").unlink()
    comparison, charts = draw([folder])
    (shown,) = mixing_content(comparison)
    legend = {entry["term"]: entry["colour"] for entry in shown["legend"]}
    scale = charts["mixing_depth_0"].spec["layer"][0]["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == legend
    assert [*legend] == terms and len(set(legend.values())) == len(terms)


def test_mixing_is_drawn_for_the_shown_run(sweep):
    comparison, charts = sweep
    run = comparison.methods[1].shown_run.index
    assert [name for name in charts if name.startswith("mixing")] == [f"mixing_depth_{run}"]
    depth = rows(charts[f"mixing_depth_{run}"], "term")
    assert len(depth) == 2 * 3 and all((row["low"], row["mean"], row["high"]) == (0.4, 0.5, 0.6) for row in depth)


@pytest.mark.parametrize("size", [1, 49, 50, 333])
def test_smoothing_is_a_centred_moving_average(size):
    values = np.random.default_rng(size).normal(size=size)
    values[size // 2] = np.nan
    half = size // 50
    windows = [values[max(0, i - half) : i + half + 1] for i in range(size)]
    expected = [np.nan if np.isnan(value) else np.nanmean(own) for value, own in zip(values, windows, strict=True)]
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)


def test_intervals_of_several_alternatives_have_a_figure(tmp_path, write_run_into):
    finals = {"swiglu": (5.0, 5.1, 5.3), "qdmoa": (4.9, 5.2, 5.0), "bimoa": (4.8, 4.9, 5.0)}
    folders = [
        write_run_into(tmp_path, f"{ffn}{seed}", encoder=f"vit_tiny_patch4_{ffn}", seed=seed, final=final)
        for ffn, own in finals.items()
        for seed, final in enumerate(own)
    ]
    comparison, charts = draw(folders)
    losses = {
        label: [run.final("loss_norm") for run in method.runs]
        for method in comparison.methods
        for label in [method.label]
    }
    gaps = {label: np.subtract(losses[label], losses["SwiGLU"]) for label in ("qd-MoA", "bi-MoA")}
    found = {row["ffn"]: (row["mean"], row["low"], row["high"]) for row in rows(charts["loss_difference"], "mean")}
    assert list(found) == ["bi-MoA", "qd-MoA"]  # by rising loss
    for label, gap in gaps.items():
        limits = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
        assert found[label] == pytest.approx((gap.mean(), *limits), rel=1e-4)
    points = [(row["ffn"], row["seed"], row["value"]) for row in rows(charts["loss_difference"], "value")]
    assert sorted(points) == [
        (label, seed, pytest.approx(gaps[label][seed], abs=1e-5)) for label in sorted(gaps) for seed in (0, 1, 2)
    ]
    assert "loss_difference" not in draw(folders[:6])[1]


def test_evaluators_have_a_figure_and_a_table(tmp_path, write_run_into):
    folders = [write_run_into(tmp_path, "a", steps=40), write_run_into(tmp_path, "b", steps=40, encoder=MOA)]
    for number, folder in enumerate(folders):
        with (folder / "metrics.jsonl").open("a") as file:
            for step, accuracy in ((20, 0.3), (40, 0.4), (40, 0.5)):  # a resumed run repeats a step
                row = {"kind": "eval", "step": step, "samples": 64 * step, "epoch": 0.5, "wall_s": 1.0}
                file.write(json.dumps(row | {"knn/accuracy": accuracy + 0.1 * number}) + "\n")
    comparison, charts = draw(folders)
    found = {(row["run"], row["x"]): row["y"] for row in rows(charts["evaluation_0"], "x", "y")}
    last = {20: 0.3, 40: 0.5}
    assert found == {(run, 64 * step): pytest.approx(y + 0.1 * run) for run in (0, 1) for step, y in last.items()}
    tables = make_tables(comparison)
    assert [(row["name"], row["step"], row["samples"]) for row in tables["evaluation_runs"]] == [
        ("knn/accuracy", step, 64 * step) for step in last
    ] * 2
    baseline, other = tables["evaluations"]
    assert (baseline["value"], other["value"], other["difference"]) == pytest.approx((0.5, 0.6, 0.1))
