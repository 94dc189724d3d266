import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from moa_eval.page import formatting
from moa_eval.page.writing import write_page
from moa_eval.zero_shot.contrasts import compare_evaluations
from moa_eval.zero_shot.output import read_evaluation
from moa_eval.zero_shot.report import zero_shot_section
from moa_eval.zero_shot.verdict import caveats, verdict

LABELS = {"arc_challenge": "ARC-C", "hellaswag": "HellaSwag", "openbookqa": "OpenBookQA", "winogrande": "WinoGrande"}
METRICS = {"arc_challenge": ["acc", "acc_norm"], "winogrande": ["acc"], "piqa": ["acc", "acc_norm"]}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The page as a browser's parser meets it; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "td"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open):
            self.cells[-1] += data


def rows(out, name):
    with (out / "tables" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def write(files, out, title=None):
    """Write the page of some results; return its folder."""
    section = zero_shot_section(files, title=title)
    return write_page([section], out, title=section.title, command="scripts/compare_evals.py").parent


def compared(files):
    return compare_evaluations([read_evaluation(file) for file in files])


@pytest.fixture(scope="module")
def report(tmp_path_factory, write_results):
    """Three results, one task beside the four, and their report."""
    root = tmp_path_factory.mktemp("report")
    tasks = {
        "piqa": ("acc", "acc_norm"),
        **dict.fromkeys(list(LABELS)[:3], ("acc", "acc_norm")),
        "winogrande": ("acc",),
    }
    files = [
        write_results(root / str(number), f"models/{name}", skill=skill, items=200, tasks=tasks)
        for number, (name, skill) in enumerate({"Llama <i>": 0.4, "one|MoA": 0.42, "qd-MoA": 0.6}.items())
    ]
    return files, write(files, root / "out", "Zero & shot")


def test_the_csv_has_the_harness_values(report):
    files, out = report
    found = {(row["task"], row["metric"], row["model"]): row for row in rows(out, "zero_shot.csv")}
    number = 0
    for file, model in zip(files, ("Llama <i>", "one|MoA", "qd-MoA"), strict=True):
        results = json.loads(file.read_text())["results"]
        for task in results:
            for metric in METRICS.get(task, ["acc", "acc_norm"]):
                row = found[task, metric, model]
                assert float(row["value"]) == results[task][f"{metric},none"]
                assert float(row["stderr"]) == results[task][f"{metric}_stderr,none"]
                assert (row["items"], row["shots"]) == ("200", "0")
                number += 1
        headline = np.mean([results[t][f"{'acc' if t == 'winogrande' else 'acc_norm'},none"] for t in LABELS])
        assert float(found["average", "headline", model]["value"]) == pytest.approx(headline)
        assert found["average", "headline", model]["items"] == "800"
    assert len(found) == number + 2 * 3  # both averages of every model


def test_the_csv_says_which_metric_is_the_headline(report):
    marked = {(row["task"], row["metric"]) for row in rows(report[1], "zero_shot.csv") if row["headline"] == "True"}
    four = {(task, "acc" if task == "winogrande" else "acc_norm") for task in LABELS}
    assert marked == four | {("piqa", "acc_norm"), ("average", "headline")}


def test_the_paired_csv_against_the_samples_and_scipy(report):
    files, out = report
    contents = [json.loads(file.read_text())["results"] for file in files]
    tested = [row for row in rows(out, "paired.csv") if row["task"] != "average"]
    assert len(tested) == 2 * (2 * 4 + 1)
    for row in tested:
        model = ["Llama <i>", "one|MoA", "qd-MoA"].index(row["model"])
        task, metric = row["task"], row["metric"]
        paths = [next(files[side].parent.glob(f"samples_{task}_*")) for side in (0, model)]
        samples = [[json.loads(line) for line in path.read_text().split("\n") if line] for path in paths]
        a, b = (np.array([sample[metric] for sample in own]) for own in samples)
        only = [int(np.sum((b == 1) & (a == 0))), int(np.sum((a == 1) & (b == 0)))]
        assert [int(row["only_model_right"]), int(row["only_baseline_right"])] == only
        expected = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
        assert float(row["p_value"]) == pytest.approx(expected, rel=1e-9)
        change = contents[model][task][f"{metric},none"] - contents[0][task][f"{metric},none"]
        assert float(row["difference"]) == pytest.approx(change, abs=1e-12)
        error = stats.sem(b - a)
        assert float(row["standard_error"]) == pytest.approx(error)
        assert float(row["low_95"]) == pytest.approx(change - 1.96 * error, abs=0.4 * error + 0.005)
        assert float(row["high_95"]) == pytest.approx(change + 1.96 * error, abs=0.4 * error + 0.005)


def test_the_address_of_a_function_is_no_difference(tmp_path, write_results):
    files = [write_results(tmp_path / str(number), f"models/{number}") for number in range(2)]
    for file, address in zip(files, ("7efc30f46a20", "7f4115cdea20"), strict=True):
        content = json.loads(file.read_text())
        content["configs"]["winogrande"]["doc_to_text"] = f"<function doc_to_text at 0x{address}>"
        file.write_text(json.dumps(content))
    summary = (write(files, tmp_path / "out") / "summary.md").read_text()
    assert "model_args.pretrained" in summary
    assert "doc_to_text" not in summary


def test_the_page_has_every_task_model_and_setting(report):
    files, out = report
    text = (out / "index.html").read_text()
    cells = Page(text).cells
    for label in (*LABELS.values(), "Average", "piqa"):
        assert any(cell.startswith(label) for cell in cells)
    assert "Llama &lt;i&gt;" in text and "<h1>Zero &amp; shot</h1>" in text
    for file in files:
        results = json.loads(file.read_text())["results"]["hellaswag"]
        shown = f"{100 * results['acc_norm,none']:.2f}\u00a0±\u00a0{100 * results['acc_norm_stderr,none']:.2f}"
        assert any(cell.startswith(shown) for cell in cells)
        assert any(f"acc {100 * results['acc,none']:.2f}" in cell for cell in cells)
        assert str(file) in cells
    for setting in (
        "torch.bfloat16",
        "0.4.13",
        "0123abc",
        "2026-11-21 10:11:12 UTC",
        "4 min 10 s",
        "2.15.0",
        "123.5 M",
    ):
        assert setting in cells, setting
    assert "model_args.pretrained" in cells


def test_the_summary_is_a_table_for_a_pull_request(report):
    text = (report[1] / "summary.md").read_text()
    assert text.startswith("# Zero & shot\n\n**qd-MoA is ")
    assert "one\\|MoA" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 7 + 2 + 2, 2 + 9 + 2, 2 + 9 + 2, 2 + 1]
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_figure_is_drawn_where_the_values_are(report):
    """Every point of the chart is a model's accuracy in a task, with its 95 % interval."""
    files, out = report
    assert (out / "figures" / "accuracy.png").stat().st_size > 1000
    section = zero_shot_section(files)
    assert [(own.label, own.group, own.shown) for own in section.series] == [
        (model, model, True) for model in ("Llama <i>", "one|MoA", "qd-MoA")
    ]
    results = json.loads(files[2].read_text())["results"]
    keys = {task: "acc" if task == "winogrande" else "acc_norm" for task in LABELS}
    points = {(row["run"], row["task"]): row for row in data(section.charts["accuracy"].spec)}
    for task, metric in keys.items():
        value, error = (100 * results[task][f"{metric}{kind},none"] for kind in ("", "_stderr"))
        point = points[2, LABELS[task]]
        assert (point["accuracy"], point["low"]) == pytest.approx((value, value - 1.959964 * error))
    average = np.mean([100 * results[task][f"{metric},none"] for task, metric in keys.items()])
    assert points[2, "Average"]["accuracy"] == pytest.approx(average)


def data(spec):
    """All inline data of a Vega-Lite specification."""
    own = [row for dataset in spec.get("datasets", {}).values() for row in dataset]
    own += spec.get("data", {}).get("values", [])
    return own + [row for layer in spec.get("layer", []) for row in data(layer)]


def test_a_difference_too_small_to_see_is_said_to_be(tmp_path, write_results):
    files = [write_results(tmp_path / n, f"m/{n}", items=100, seed=seed) for n, seed in (("a", 1), ("b", 2))]
    comparison = compared(files)
    average = comparison.find("average", "headline", 1)
    assert average.p_value > 0.05
    first, second = verdict(comparison)
    direction = "above" if average.difference > 0 else "below"
    shown = formatting.points(average.difference)[1:]
    assert first.startswith(f"b is {shown} points {direction} a on the average of the four tasks: ")
    assert second.endswith(
        "no difference of this size can be seen with 400 items; the smallest that would be seen in 4 of 5 such "
        f"evaluations is about {formatting.accuracy(average.detectable)} points."
    )
    assert "Task by task, after Holm's correction for 4 tests, no single task differs." in caveats(comparison)


def test_a_difference_that_can_be_seen_is_said_to_be(report):
    files, _ = report
    comparison = compared(files)
    first, second = verdict(comparison)
    assert first.startswith("qd-MoA is ") and " above Llama <i> " in first
    assert "p\u00a0<\u00a00.0001 after Holm's correction for 2 models" in second
    assert second.endswith("more than the luck of which items were asked.")
    notes = "\n".join(caveats(comparison))
    assert "after Holm's correction for 10 tests, " in notes and "qd-MoA's HellaSwag (+" in notes
    assert "The verdict takes the best of 2 alternatives" in notes
    assert "another training seed moves it too" in notes


def test_equal_answers_are_said_to_be_equal(tmp_path, write_results):
    files = [write_results(tmp_path, f"m/{name}") for name in "ab"]
    first, second = verdict(compared(files))
    assert first.startswith("b and a are equal on the average of the four tasks: ")
    assert second == "The two are right and wrong on the same of 160 items: nothing tells them apart here."


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"hellaswag": ("acc", "acc_norm")}, " on HellaSwag (acc_norm): "),
        ({"hellaswag": ("acc",), "winogrande": ("acc",)}, " on the average of HellaSwag and WinoGrande: "),
        ({"piqa": ("acc",)}, " on piqa (acc): "),
        (
            {"piqa": ("acc",), "sciq": ("acc",)},
            "None of the paper's four tasks is here, so there is no average; after ",
        ),
    ],
    ids=["one", "two", "other", "others"],
)
def test_other_sets_of_tasks(tmp_path, write_results, tasks, words):
    files = [write_results(tmp_path, f"m/{n}", skill=s, items=150, tasks=tasks) for n, s in (("a", 0.4), ("b", 0.6))]
    out = write(files, tmp_path / "out")
    Page((out / "index.html").read_text())
    summary = (out / "summary.md").read_text()
    assert words in summary
    partial = "ARC-C and OpenBookQA are missing, so the average is not the paper's."
    assert (partial in summary) == (len(tasks) == 2 and "hellaswag" in tasks)


def test_what_a_reader_should_know_is_said(tmp_path, write_results):
    files = [write_results(tmp_path, f"m/{name}", shots=5, limit=40) for name in "ab"]
    content = json.loads(files[1].read_text())
    content["config"] |= {"model": "hf", "model_dtype": "torch.float32"}
    content["lm_eval_version"] = "0.4.14"
    content["results"]["hellaswag"] = {k: v for k, v in content["results"]["hellaswag"].items() if "stderr" not in k}
    files[1].write_text(json.dumps(content))
    notes = caveats(compared(files))
    assert "Run with --limit 40: these are not the whole tasks." in notes
    assert any(note.startswith("Not zero-shot: ARC-C with 5 shots, ") for note in notes)
    assert "Model types differ: moa (a), hf (b)." in notes
    assert "Number formats differ: torch.bfloat16 (a), torch.float32 (b)." in notes
    assert "Harness versions differ: 0.4.13 (a), 0.4.14 (b)." in notes
    scores = [compared(files).score("average", "headline", model).stderr for model in (0, 1)]
    assert scores[0] == pytest.approx(scores[1])  # the lacking error is computed from the items


def test_a_metric_that_is_no_mean_is_shown_and_not_tested(tmp_path, write_results):
    files = [write_results(tmp_path, f"m/{name}", tasks={"wikitext": ("acc",)}) for name in "ab"]
    for file in files:
        content = json.loads(file.read_text())
        content["results"]["wikitext"]["word_perplexity,none"] = 25.25
        file.write_text(json.dumps(content))
    out = write(files, tmp_path / "out")
    assert {row["metric"] for row in rows(out, "zero_shot.csv")} == {"acc", "word_perplexity"}
    assert {row["metric"] for row in rows(out, "paired.csv")} == {"acc"}
    assert "25.2500" in (out / "index.html").read_text()


def test_one_result_is_reported_alone(tmp_path, write_results):
    out = write([write_results(tmp_path, "m/a")], tmp_path / "out")
    Page((out / "index.html").read_text())
    summary = (out / "summary.md").read_text()
    assert "on the average of the four tasks; there is nothing to compare it with." in summary


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formatting.accuracy, 0.36519, "36.52"),
        (formatting.accuracy, math.nan, "–"),
        (formatting.points, -0.00761, "−0.76"),
        (formatting.points, 0.0145, "+1.45"),
        (formatting.points, -1e-18, "0.00"),
        (formatting.probability, 0.2448, "0.24"),
        (formatting.probability, 0.01849, "0.018"),
        (formatting.probability, 0.00001, "< 0.0001"),
        (formatting.probability, 1.0, "1.00"),
        (formatting.probability, math.nan, "–"),
    ],
)
def test_numbers_as_a_reader_sees_them(function, value, text):
    assert function(value) == text
