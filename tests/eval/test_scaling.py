"""Loss against size: fits, slopes, equivalent sizes."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from moa_eval.training.grouping import compare
from moa_eval.training.reading import read_run
from moa_eval.training.scaling import fit_lines, line_rows, scaling_rows, sentences
from moa_eval.training.size_figures import against_size

SIZES = {"dense-0.12b": 40e6, "dense-0.25b": 150e6, "dense-0.5b": 340e6}
PARALLEL = {"swiglu": (12.0, -0.08), "qdmoa": (11.9, -0.08)}


@pytest.fixture
def study(make_run):
    """Comparison of FFNs with exact laws, loss = scale * N^slope, at three sizes."""

    def make(laws, seeds=(0,), noise=0.0, sizes=SIZES):
        runs = []
        for number, (ffn, (scale, slope)) in enumerate(laws.items()):
            for place, (size, inner) in enumerate(sizes.items()):
                for seed in seeds:
                    counts = {"total": 77e6 + inner, "active": 77e6 + inner, "non_embedding": inner}
                    folder = make_run(
                        f"{ffn}{size}{seed}", ffn=ffn, seed=seed, steps=20, changes={"model.size": size},
                        parameters=counts,
                    )  # fmt: skip
                    loss = scale * inner**slope * (1 + noise * math.sin(1 + 7 * number + 3 * place + 5 * seed))
                    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                    rows[-1]["loss"] = loss
                    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                    runs.append(read_run(folder))
        return compare(runs)

    return make


def test_exact_power_laws_are_recovered(study):
    base, better = lines = fit_lines(study(PARALLEL))
    for line, (scale, slope) in zip(lines, PARALLEL.values(), strict=True):
        assert (line.slope, math.exp(line.intercept)) == pytest.approx((slope, scale), rel=1e-9)
    assert (base.label, base.is_baseline, better.label) == ("SwiGLU", True, "qd-MoA")
    assert better.slope_difference.mean == pytest.approx(0, abs=1e-12)
    for size in SIZES.values():  # 12 (x N)^-0.08 = 11.9 N^-0.08
        assert better.equivalent_ratio(size) == pytest.approx((12.0 / 11.9) ** (1 / 0.08), rel=1e-6)
        assert base.equivalent_ratio(size) == 1


def test_slope_difference_is_fitted_to_paired_losses(study):
    comparison = study({"swiglu": (12.0, -0.08), "qdmoa": (13.0, -0.09)}, seeds=(0, 1), noise=1e-3)
    line = fit_lines(comparison)[1]
    losses = {(run.ffn, run.config["model"]["size"], run.seed): run.validation["loss"][-1] for run in comparison.runs}
    pairs = [(size, seed) for size in SIZES for seed in (0, 1)]
    x = [math.log(SIZES[size]) for size, _ in pairs]
    y = [math.log(losses["qdmoa", *pair] / losses["swiglu", *pair]) for pair in pairs]
    expected = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 4) * expected.stderr
    assert line.slope_difference[:3] == pytest.approx(
        (expected.slope, expected.slope - half, expected.slope + half), rel=1e-6
    )


@pytest.mark.parametrize(("slope", "words"), [(-0.08, "may be parallel"), (-0.09, "are not parallel")])
def test_sentences_tell_whether_lines_are_parallel(study, slope, words):
    scale = 12.0 * 40e6 ** (-0.08 - slope)
    found = sentences(fit_lines(study({"swiglu": (12.0, -0.08), "qdmoa": (scale, slope)}, seeds=(0, 1), noise=1e-4)))
    assert "−0.0800 (SwiGLU)" in found[0] and words in found[1]


def test_tables_and_figure_have_all_points(study):
    comparison = study(PARALLEL, seeds=(0, 1))
    lines = fit_lines(comparison)
    rows = scaling_rows(lines)
    assert [(row["ffn"], row["size"]) for row in rows] == [
        (ffn, size) for ffn in ("SwiGLU", "qd-MoA") for size in SIZES
    ]
    assert [row["parameters"] for row in rows] == [*SIZES.values()] * 2
    assert [row["loss"] for row in rows] == pytest.approx([row["fitted"] for row in rows])
    assert {row["flops"] for row in rows} == {20 * 64 * 3_000_000}
    assert [row["sizes"] for row in line_rows(lines)] == [3, 3]
    chart = against_size(comparison, lines)
    ends, points = (chart.spec["datasets"][layer["data"]["name"]] for layer in chart.spec["layer"])
    assert len(points) == 12
    assert [row["parameters"] for row in ends] == [40e6, 340e6] * 2


def test_two_sizes_are_not_fitted(study):
    comparison = study(PARALLEL, sizes=dict([*SIZES.items()][:2]))
    assert fit_lines(comparison) == [] and sentences([]) == [] and against_size(comparison, []) is None


def test_a_rising_line_has_no_equivalent_size(study):
    lines = fit_lines(study({"swiglu": (1.0, 0.01), "qdmoa": (0.9, 0.01)}))
    assert np.isnan(lines[1].equivalent_ratio(1e8)) and "reaches" not in " ".join(sentences(lines))
