"""The page of zero-shot results against the files of lm-eval, and scipy."""

import csv
import html
import json
import re

import numpy as np
import pytest
from scipy import stats

from moa_eval.page import formatting
from moa_eval.page.writing import write_page
from moa_eval.zero_shot.comparison import compare_evaluations
from moa_eval.zero_shot.report import sentences, zero_shot_section
from moa_eval.zero_shot.results import read_evaluation

LABELS = {"arc_challenge": "ARC-C", "hellaswag": "HellaSwag", "openbookqa": "OpenBookQA", "winogrande": "WinoGrande"}
HEADLINES = {task: "acc" if task == "winogrande" else "acc_norm" for task in LABELS}
MODELS = ["Llama <i>", "one|MoA", "qd-MoA"]


def cells(out):
    """Texts of the table cells of a page."""
    found = re.findall(r"<t[hd][ >].*?</t[hd]>", (out / "index.html").read_text(), re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in found]


def rows(out, name):
    with (out / "tables" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def write(files, out, title=None):
    """Write the page of some results; return its folder."""
    section = zero_shot_section(files, title=title)
    return write_page([section], out, title=section.title, command="scripts/compare_evals.py").parent


def compared(files):
    return compare_evaluations([read_evaluation(file) for file in files])


def verdict(files):
    return sentences("zero_shot_verdict.txt", compared(files))


def caveats(files):
    return sentences("zero_shot_caveats.txt", compared(files))


@pytest.fixture(scope="module")
def report(tmp_path_factory, write_results):
    """Three results with a fifth task, and the folder of their page."""
    root = tmp_path_factory.mktemp("report")
    tasks = {
        "piqa": ("acc", "acc_norm"),
        **dict.fromkeys(list(LABELS)[:3], ("acc", "acc_norm")),
        "winogrande": ("acc",),
    }
    files = [
        write_results(root / str(number), f"models/{name}", skill=skill, items=200, tasks=tasks)
        for number, (name, skill) in enumerate(zip(MODELS, (0.4, 0.42, 0.6), strict=True))
    ]
    return files, write(files, root / "out", "Zero & shot")


def test_scores_csv_has_the_values_of_lm_eval(report):
    files, out = report
    found = {(row["task"], row["metric"], row["model"]): row for row in rows(out, "zero_shot.csv")}
    for file, model in zip(files, MODELS, strict=True):
        results = json.loads(file.read_text())["results"]
        for task, metrics in results.items():
            for metric in (key.removesuffix(",none") for key in metrics if key in ("acc,none", "acc_norm,none")):
                row = found.pop((task, metric, model))
                assert float(row["value"]) == metrics[f"{metric},none"]
                assert float(row["stderr"]) == metrics[f"{metric}_stderr,none"]
                assert (row["items"], row["shots"]) == ("200", "0")
                assert (row["headline"] == "True") == (metric == HEADLINES.get(task, "acc_norm"))
        average = found.pop(("average", "headline", model))
        expected = np.mean([results[task][f"{metric},none"] for task, metric in HEADLINES.items()])
        assert float(average["value"]) == pytest.approx(expected)
        assert average["items"] == "800"
    assert {(task, metric) for task, metric, _ in found} == {("average", "acc")}


def test_paired_csv_matches_samples_and_scipy(report):
    files, out = report
    contents = [json.loads(file.read_text())["results"] for file in files]
    tested = [row for row in rows(out, "paired.csv") if row["task"] != "average"]
    assert len(tested) == 2 * (2 * 4 + 1)
    for row in tested:
        model = MODELS.index(row["model"])
        task, metric = row["task"], row["metric"]
        paths = [next(files[side].parent.glob(f"samples_{task}_*")) for side in (0, model)]
        samples = [[json.loads(line) for line in path.read_text().split("\n") if line] for path in paths]
        a, b = (np.array([sample[metric] for sample in own]) for own in samples)
        only = [int(np.sum((b == 1) & (a == 0))), int(np.sum((a == 1) & (b == 0)))]
        assert [int(row["only_model_right"]), int(row["only_baseline_right"])] == only
        assert float(row["p_value"]) == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue, rel=1e-9)
        change = contents[model][task][f"{metric},none"] - contents[0][task][f"{metric},none"]
        error = stats.sem(b - a)
        assert float(row["difference"]) == pytest.approx(change, abs=1e-12)
        assert float(row["standard_error"]) == pytest.approx(error)
        assert float(row["low_95"]) == pytest.approx(change - 1.96 * error, abs=0.4 * error + 0.005)
        assert float(row["high_95"]) == pytest.approx(change + 1.96 * error, abs=0.4 * error + 0.005)


def test_function_addresses_are_no_config_difference(tmp_path, write_results):
    files = [write_results(tmp_path / str(number), f"models/{number}") for number in range(2)]
    for file, address in zip(files, ("7efc30f46a20", "7f4115cdea20"), strict=True):
        content = json.loads(file.read_text())
        content["configs"]["winogrande"]["doc_to_text"] = f"<function doc_to_text at 0x{address}>"
        file.write_text(json.dumps(content))
    assert [row["key"] for row in rows(write(files, tmp_path / "out"), "config.csv")] == ["model_args.pretrained"]


def test_page_shows_scores(report):
    files, out = report
    text, found = (out / "index.html").read_text(), cells(out)
    for label in (*LABELS.values(), "Average", "piqa"):
        assert any(cell.startswith(label) for cell in found)
    assert "Llama &lt;i&gt;" in text and "<h1>Zero &amp; shot</h1>" in text
    for file in files:
        results = json.loads(file.read_text())["results"]["hellaswag"]
        shown = f"{100 * results['acc_norm,none']:.2f}\u00a0±\u00a0{100 * results['acc_norm_stderr,none']:.2f}"
        assert any(cell.startswith(shown) for cell in found)
        assert any(f"acc {100 * results['acc,none']:.2f}" in cell for cell in found)


def test_summary_has_well_formed_tables(report):
    text = (report[1] / "summary.md").read_text()
    assert text.startswith("# Zero & shot\n\n**qd-MoA is ")
    assert "one\\|MoA" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 7 + 2 + 2, 2 + 9 + 2, 2 + 9 + 2, 2 + 1]
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_figure_shows_headline_accuracies_with_intervals(report):
    files, out = report
    assert (out / "figures" / "accuracy.png").stat().st_size > 1000
    section = zero_shot_section(files)
    assert [own.label for own in section.series] == MODELS
    results = json.loads(files[2].read_text())["results"]
    points = {(row["run"], row["task"]): row for row in data(section.charts["accuracy"].spec)}
    for task, metric in HEADLINES.items():
        value, error = (100 * results[task][f"{metric}{kind},none"] for kind in ("", "_stderr"))
        point = points[2, LABELS[task]]
        assert (point["accuracy"], point["low"]) == pytest.approx((value, value - 1.959964 * error))
    average = np.mean([100 * results[task][f"{metric},none"] for task, metric in HEADLINES.items()])
    assert points[2, "Average"]["accuracy"] == pytest.approx(average)


def data(spec):
    """All inline data of a Vega-Lite specification."""
    own = [row for dataset in spec.get("datasets", {}).values() for row in dataset]
    own += spec.get("data", {}).get("values", [])
    return own + [row for layer in spec.get("layer", []) for row in data(layer)]


def test_verdict_of_an_insignificant_difference(tmp_path, write_results):
    files = [write_results(tmp_path / n, f"m/{n}", items=100, seed=seed) for n, seed in (("a", 1), ("b", 2))]
    comparison = compared(files)
    [average] = comparison.of(comparison.average)
    assert average.p_value > 0.05
    first, second = verdict(files)
    direction = "above" if average.difference > 0 else "below"
    shown = formatting.points(average.difference)[1:]
    assert first.startswith(f"b is {shown} points {direction} a on the average of the four tasks: ")
    assert "the difference is not statistically significant" in second
    assert f" is about {formatting.accuracy(average.detectable)} points." in second
    assert "Task by task, after Holm's correction for 4 tests, no difference is significant." in caveats(files)


def test_verdict_and_caveats_of_a_significant_difference(report):
    files, _ = report
    first, second = verdict(files)
    assert first.startswith("qd-MoA is ") and " above Llama <i> " in first
    assert "p\u00a0<\u00a00.0001 after Holm's correction for 2 models" in second
    assert second.endswith("the difference is statistically significant.")
    notes = "\n".join(caveats(files))
    assert "after Holm's correction for 10 tests, these differences are significant: " in notes
    assert "qd-MoA on HellaSwag (+" in notes
    assert "The verdict reports the best of 2 alternatives" in notes


def test_verdict_of_equal_answers(tmp_path, write_results):
    first, second = verdict([write_results(tmp_path, f"m/{name}") for name in "ab"])
    assert first.startswith("b and a score the same on the average of the four tasks: ")
    assert second == "Both models answer the same of 160 items correctly, so these items show no difference."


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"hellaswag": ("acc", "acc_norm")}, " on HellaSwag (acc_norm): "),
        (
            {"hellaswag": ("acc",), "winogrande": ("acc",)},
            "The average is not the paper's: it lacks ARC-C, OpenBookQA.",
        ),
        ({"piqa": ("acc",)}, " on piqa (acc): "),
        ({"piqa": ("acc",), "sciq": ("acc",)}, "so there is no average; after Holm's correction for 2 tests, these"),
    ],
    ids=["one", "two", "other", "others"],
)
def test_other_sets_of_tasks(tmp_path, write_results, no_figures, tasks, words):
    files = [write_results(tmp_path, f"m/{n}", skill=s, items=150, tasks=tasks) for n, s in (("a", 0.4), ("b", 0.6))]
    out = write(files, tmp_path / "out")
    assert words in (out / "summary.md").read_text()


def test_caveats_name_different_settings(tmp_path, write_results):
    files = [write_results(tmp_path, f"m/{name}", shots=5, limit=40) for name in "ab"]
    content = json.loads(files[1].read_text())
    content["config"] |= {"model": "hf", "model_dtype": "torch.float32"}
    content |= {"lm_eval_version": "0.4.14", "git_hash": "4567def"}
    files[1].write_text(json.dumps(content))
    notes = caveats(files)
    assert "Evaluated with --limit 40: the tasks are incomplete." in notes
    assert any(note.startswith("Not zero-shot: ARC-C has 5 shots, ") for note in notes)
    assert "Model types differ: moa (a), hf (b)." in notes
    assert "Dtypes differ: torch.bfloat16 (a), torch.float32 (b)." in notes
    assert "lm-eval versions differ: 0.4.13 (a), 0.4.14 (b)." in notes
    assert "Code versions differ: 0123abc (a), 4567def (b)." in notes


def test_caveats_of_few_discordant_items_and_older_results(tmp_path, write_results):
    write_results(tmp_path / "b", "m/b", skill=0.52, date="2026-11-20T10-11-12")
    files = [write_results(tmp_path / n, f"m/{n}", skill=s) for n, s in (("a", 0.5), ("b", 0.52))]
    notes = caveats([files[0], tmp_path / "b"])
    assert any(note.startswith("b and a disagree on few items (") for note in notes)
    assert f"{tmp_path / 'b'}: {files[1].name} is used; older results in this folder (1) are ignored." in notes


def test_metric_that_is_no_mean_is_shown_and_not_tested(tmp_path, write_results, no_figures):
    files = [write_results(tmp_path, f"m/{name}", tasks={"wikitext": ("acc",)}) for name in "ab"]
    for file in files:
        content = json.loads(file.read_text())
        content["results"]["wikitext"]["word_perplexity,none"] = 25.25
        file.write_text(json.dumps(content))
    out = write(files, tmp_path / "out")
    assert {row["metric"] for row in rows(out, "zero_shot.csv")} == {"acc", "word_perplexity"}
    assert {row["metric"] for row in rows(out, "paired.csv")} == {"acc"}
    assert "25.2500" in (out / "index.html").read_text()
