import json
import math

import numpy as np
import pytest
from scipy import stats

from moa_eval.page.writing import as_csv
from moa_eval.training.grouping import compare
from moa_eval.training.reading import read_run
from moa_eval.training.readme import results_markdown
from moa_eval.training.tables import make_tables
from moa_eval.training.tolerance import good_range
from moa_train.errors import DataError

MOA = "vit_tiny_patch4_qdmoa"
SPACES = ("loss_norm", "loss_pixel")


def metrics(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def last(folder, loss):
    return metrics(folder, "val")[-1][loss]


def tabulate(folders):
    comparison = compare([read_run(folder) for folder in folders])
    return make_tables(comparison)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, write_run_into):
    """SwiGLU at one rate and qd-MoA at four, two seeds each, and their tables."""
    root = tmp_path_factory.mktemp("sweep")
    folders = {
        ("swiglu", 1e-3, seed): write_run_into(root, f"s{seed}", lr=1e-3, seed=seed, final=5.0, probes={"knn": 0.5})
        for seed in (0, 1)
    }
    for rate, final, changes in (
        (5e-4, 4.5, {}), (1e-3, 4.02, {}), (2e-3, 4.0, {"probes": {"knn": 0.6}}), (4e-3, 1.0, {"nan_from": 35}),
    ):  # fmt: skip
        for seed in (0, 1):
            folders["qdmoa", rate, seed] = write_run_into(
                root, f"m{rate}_{seed}", encoder=MOA, lr=rate, seed=seed, final=final, mixing=6000, **changes
            )
    return folders, tabulate(folders.values())


def finals(folders, ffn, rate, loss):
    return [last(folders[ffn, rate, seed], loss) for seed in (0, 1)]


def test_losses_are_means_over_the_seeds_of_the_best_group(sweep):
    folders, tables = sweep
    first, second = tables["losses"]
    assert (first["method"], first["rate"], first["rates_tried"]) == ("SwiGLU", 1e-3, 1)
    assert (second["method"], second["rate"], second["rates_tried"]) == ("qd-MoA", 2e-3, 4)
    assert (second["baseline"], second["seeds"], second["unit"], second["seen"]) == ("SwiGLU", 2, "image", 2560)
    for loss in SPACES:
        a, b = finals(folders, "qdmoa", 2e-3, loss), finals(folders, "swiglu", 1e-3, loss)
        assert second[f"final_{loss}"] == pytest.approx(np.mean(a), rel=1e-12)
        assert second[f"final_{loss}_sd"] == pytest.approx(np.std(a, ddof=1), rel=1e-9)
        lowest = [min(row[loss] for row in metrics(folders["qdmoa", 2e-3, seed], "val")) for seed in (0, 1)]
        assert second[f"best_{loss}"] == pytest.approx(np.mean(lowest), rel=1e-12)
        assert second[f"{loss}_difference"] == pytest.approx(np.mean(a) - np.mean(b), rel=1e-9)
        assert second[f"{loss}_relative"] == pytest.approx(np.mean(a) / np.mean(b) - 1, rel=1e-9)
        limits = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (second[f"{loss}_low_95"], second[f"{loss}_high_95"]) == pytest.approx(limits, rel=1e-6)
        assert second[f"{loss}_interval"] == "paired t" and math.isnan(first[f"{loss}_difference"])


def test_runs_have_their_losses_and_differences_to_the_baseline_mean(sweep):
    folders, tables = sweep
    names = {row["name"]: row for row in tables["runs"]}
    assert len(names) == len(folders)
    reference = np.mean(finals(folders, "swiglu", 1e-3, "loss_pixel"))
    for (ffn, rate, seed), folder in folders.items():
        row = names[folder.name]
        assert (row["rate"], row["seed"]) == (rate, seed)
        assert row["is_best"] == ((ffn, rate) in (("swiglu", 1e-3), ("qdmoa", 2e-3)))
        value = last(folder, "loss_pixel")
        if rate == 4e-3:
            assert row["status"] == "diverged" and math.isnan(row["final_loss_pixel"])
            assert row["best_loss_norm"] == min(r["loss_norm"] for r in metrics(folder, "val")[:3])
        else:
            assert row["final_loss_pixel"] == value
            assert row["final_loss_pixel_difference"] == pytest.approx(value - reference, abs=1e-12)
            assert row["final_loss_pixel_relative"] == pytest.approx(value / reference - 1, abs=1e-12)


def test_rates_have_the_spread_over_seeds_and_the_excess_over_the_best(sweep):
    folders, tables = sweep
    rows = tables["rates"]
    assert [row["rate"] for row in rows] == [1e-3, 5e-4, 1e-3, 2e-3, 4e-3]
    best = np.mean(finals(folders, "qdmoa", 2e-3, "loss_norm"))
    for row in rows[1:4]:
        own = finals(folders, "qdmoa", row["rate"], "loss_norm")
        assert (row["mean"], row["sd"]) == pytest.approx((np.mean(own), np.std(own, ddof=1)), rel=1e-9)
        assert (row["min"], row["max"], row["diverged"]) == (min(own), max(own), 0)
        assert row["excess"] == pytest.approx(np.mean(own) / best - 1, abs=1e-12)
    assert [row["is_best"] for row in rows] == [True, False, False, True, False]
    assert (rows[4]["seeds"], rows[4]["diverged"]) == (0, 2) and math.isnan(rows[4]["mean"])


def test_tolerance_is_the_span_of_rates_within_one_percent(sweep):
    folders, tables = sweep
    first, second = tables["tolerance"]
    assert (first["edge"], first["rates_tried"], first["span_seeds"]) == ("", 1, 0) and math.isnan(first["span"])
    assert (second["lowest_rate"], second["highest_rate"], second["best_rate"]) == (5e-4, 4e-3, 2e-3)
    rates = (5e-4, 1e-3, 2e-3)
    spans = []
    for seed in (0, 1):
        losses = [last(folders["qdmoa", rate, seed], "loss_norm") for rate in rates]
        found = good_range([*rates, 4e-3], [*losses, math.inf])
        assert found.high == pytest.approx(2e-3) and not found.open_high  # the last rate before a diverged one
        limit, fine = 1.01 * min(losses), np.exp(np.linspace(*np.log([5e-4, 2e-3]), 100_001))
        good = np.interp(np.log(fine), np.log(rates), losses) <= limit
        assert found.low == pytest.approx(fine[good][0], rel=1e-4)
        spans.append(found.high / found.low)
    logarithms = np.log(spans)
    assert second["span"] == pytest.approx(np.exp(logarithms.mean()), rel=1e-9)
    limits = stats.ttest_1samp(logarithms, 0).confidence_interval(0.95)
    assert (second["span_low_95"], second["span_high_95"]) == pytest.approx(np.exp(limits), rel=1e-6)
    assert (second["edge"], second["span_seeds"], second["diverged_rates"]) == ("", 2, 1)


def test_tolerance_beyond_the_rates_tried_has_no_upper_limit(make_run):
    folders = [
        make_run(f"{rate}{seed}", lr=rate, seed=seed, final=final)
        for rate, finals in ((1e-3, (4.2, 4.2)), (2e-3, (4.0, 4.01)))
        for seed, final in enumerate(finals)
    ]
    (row,) = tabulate(folders)["tolerance"]
    assert row["open"] == "high" and 1 < row["span_low_95"] < row["span"] < 2 and math.isnan(row["span_high_95"])


def test_good_range_of_a_parabola_in_log_rate_is_its_width():
    rates = np.exp(np.linspace(-8, -4, 401))
    losses = 3 * (1 + 0.01 * (np.log(rates) + 6) ** 2)  # within 1 % from exp(-7) to exp(-5)
    assert good_range(rates, losses) == (pytest.approx(np.exp(-7)), pytest.approx(np.exp(-5)), False, False)
    assert good_range(rates[:201], losses[:201])[2:] == (False, True)
    assert good_range(rates[250:], losses[250:])[2:] == (True, False)


def test_unfinished_runs_are_counted_but_enter_no_loss(make_run):
    moa = {"encoder": MOA, "lr": 1e-3}
    folders = [make_run("a", lr=1e-3), make_run("b", **moa), make_run("c", encoder=MOA, lr=2e-3, final=0.6)]
    before = tabulate(folders)
    cut = {"steps": 30, "status": None}
    folders += [make_run("d", **moa, seed=1, **cut), make_run("e", encoder=MOA, lr=5e-4, final=0.1, **cut)]
    after = tabulate(folders)
    early, best, worse = after["rates"][1:]
    assert (early["seeds"], early["runs"], early["unfinished"]) == (0, 1, 1) and math.isnan(early["mean"])
    assert (best["mean"], best["seeds"], best["unfinished"]) == (last(folders[1], "loss_norm"), 1, 1)
    assert after["tolerance"][1]["low_good_rate"] == pytest.approx(1e-3)
    assert worse == before["rates"][2] and after["costs"] == before["costs"]
    assert [row["final_loss_norm"] for row in after["losses"]] == [row["final_loss_norm"] for row in before["losses"]]


def test_equal_rates_compare_groups_of_one_learning_rate(sweep):
    folders, tables = sweep
    norm, pixel = tables["equal_rates"]
    assert (norm["method"], norm["baseline"], norm["rate"]) == ("qd-MoA", "SwiGLU", 1e-3)
    assert (norm["loss"], pixel["loss"]) == SPACES
    means = [np.mean(finals(folders, ffn, 1e-3, "loss_norm")) for ffn in ("qdmoa", "swiglu")]
    assert norm["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert norm["low_95"] < norm["difference"] < norm["high_95"]


def test_costs_are_medians_over_the_best_group_with_ratios(sweep):
    first, second = sweep[1]["costs"]
    assert (first["parameters"], second["parameters"], second["parameters_ratio"]) == (1e6, 1_006_000, 1.006)
    assert second["flops_per_unit_ratio"] == 3_060_000 / 3_000_000
    assert (second["mixing_parameters"], second["mixing_share"]) == (6000, 6000 / 1_006_000)
    assert (first["units_per_s"], first["peak_memory_mib"], first["training_time_s"]) == (120.0, 512.0, 2560 / 120)
    assert (first["device"], second["runs"]) == ("a processor", 2)


def test_probes_are_compared_over_seeds(sweep):
    tables = sweep[1]
    first, second = tables["probe"]
    assert (first["accuracy"], second["accuracy"], second["difference"]) == pytest.approx((0.5, 0.6, 0.1))
    assert (second["probe"], second["rate"], second["seeds"], second["val_samples"]) == ("knn", 2e-3, 2, 100)
    assert len(tables["probe_runs"]) == 4


@pytest.mark.parametrize(("table", "kind", "keys"), [("validation", "val", SPACES), ("train", "train", ("loss", "lr"))])
def test_curve_tables_have_all_recorded_rows(sweep, table, kind, keys):
    folders, tables = sweep
    expected = [row for folder in folders.values() for row in metrics(folder, kind)]
    for key in ("samples", *keys):
        np.testing.assert_array_equal([row[key] for row in tables[table]], [row[key] for row in expected])


def test_config_differences_have_a_column_per_method(make_run):
    folders = [make_run("a", lr=3e-4), make_run("b", encoder=MOA, lr=3e-4), make_run("c", encoder=MOA, lr=1.4e-2)]
    rows = tabulate(folders)["config"]
    assert [(row["key"], row["kind"]) for row in rows] == [("optim.lr", "peak rate"), ("model.encoder", "FFN")]
    assert (rows[0]["SwiGLU"], rows[0]["qd-MoA"]) == ("3e-4", "3e-4, 1.4e-2")


def test_mixing_has_a_row_per_coefficient(make_run):
    rows = tabulate([make_run("a"), make_run("b", encoder=MOA, spread=0.1)])["mixing"]
    assert len(rows) == 2 * 2 * 3  # steps, layers, coefficients
    assert [row["static"] for row in rows if row["step"] == 40] == [False] * 3 + [True, False, False]
    assert {row["std"] for row in rows if row["step"] == 20} == {0.05, 0.0}


def test_a_method_without_a_best_rate_has_unknown_losses(make_run):
    folders = [make_run("a"), *(make_run(f"b{rate}", encoder=MOA, lr=rate, nan_from=5) for rate in (1e-3, 2e-3))]
    row = tabulate(folders)["losses"][1]
    assert all(math.isnan(row[key]) for key in ("rate", "final_loss_norm", "loss_norm_difference"))
    assert (row["seeds"], row["rates_tried"]) == (0, 2)


def test_the_readme_table_shows_the_rows_of_losses(sweep, tmp_path):
    path = tmp_path / "losses.csv"
    rows = sweep[1]["losses"]
    path.write_text(as_csv(rows))
    lines = results_markdown(path).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert (first[:3], first[4], second[:3]) == (["SwiGLU", "1e-3", "2"], "baseline", ["qd-MoA", "2e-3", "2"])
    assert second[3] == f"{rows[1]['final_loss_norm']:.4f} ± {rows[1]['final_loss_norm_sd']:.4f}"
    assert second[4].startswith(f"−{-rows[1]['loss_norm_difference']:.4f} · −")


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", None], ids=["empty", "other", "missing"])
def test_another_file_is_not_a_table_of_losses(tmp_path, content):
    path = tmp_path / "losses.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"give the losses\.csv of a report"):
        results_markdown(path)
