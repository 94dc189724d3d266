"""Reading and comparing lm-eval results, some of them written by lm-eval itself."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from moa_eval.zero_shot import paired
from moa_eval.zero_shot.comparison import AVERAGE, CONTINUOUS, HEADLINE, compare_evaluations
from moa_eval.zero_shot.results import read_evaluation
from moa_train.errors import ConfigError, DataError

FOUR = ("arc_challenge", "hellaswag", "openbookqa", "winogrande")
HEADLINES = {task: "acc" if task == "winogrande" else "acc_norm" for task in FOUR}
RUN_HARNESS = """
import sys, torch.utils.collect_env
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

torch.utils.collect_env.get_pretty_env_info = lambda: "PyTorch version: any"  # it takes seconds
DummyLM.tokenizer = None  # it would be downloaded
tasks, shared, *runs = sys.argv[1:]
manager = TaskManager(include_path=shared, include_defaults=False)
for number, out in enumerate(runs):  # what the command line does
    tracker = EvaluationTracker(output_path=out)
    arguments = {"pretrained": f"models/dummy-{number}"}
    results = simple_evaluate(
        "dummy", arguments, tasks.split(","), random_seed=number, task_manager=manager, evaluation_tracker=tracker
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task in results["configs"]:
        tracker.save_results_samples(task, samples[task])
"""


def edit(file, change):
    """Change a JSON file, or every sample of a JSON-lines file (a change that returns False drops the sample)."""
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return
    samples = [json.loads(line) for line in file.read_text().split("\n") if line]
    kept = [sample for sample in samples if change(sample) is not False]
    file.write_text("".join(json.dumps(sample) + "\n" for sample in kept))


def samples_of(file, task):
    return file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")


def compare(*files, baseline=None):
    return compare_evaluations([read_evaluation(file) for file in files], baseline)


def labels(comparison):
    return [model.label for model in comparison.models]


def contrast(comparison, task, metric, model=1):
    """The contrast of one model in one metric of a task."""
    [found] = [
        c
        for c in comparison.contrasts
        if (c.measure.task, c.measure.metric) == (task, metric) and c.model is comparison.models[model]
    ]
    return found


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Two results that the harness itself wrote, of its dummy model on small local tasks; no network."""
    root = tmp_path_factory.mktemp("harness")
    for task in (*FOUR, "extra"):
        docs = [{"q": f"{task} {i}", "choices": [f"a{i}", f"bb{i}", "c"], "gold": i % 3} for i in range(30)]
        (root / f"{task}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        metrics = ["acc"] if task == "winogrande" else ["acc", "acc_norm"]
        config = {
            "task": task, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(root / f"{task}.jsonl")}}, "metadata": {"version": 1.0},
            "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        }  # fmt: skip
        if task == "extra":
            config["metric_list"].append({"metric": "brier_score"})  # not the mean of numbers in the samples
        (root / f"{task}.yaml").write_text(json.dumps(config))  # YAML holds JSON
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    arguments = [",".join((*FOUR, "extra")), str(root), str(root / "a"), str(root / "b")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_HARNESS, *arguments], env=os.environ | offline, capture_output=True, text=True,
        cwd=root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "a", root / "b"


def test_results_of_lm_eval_are_read(harness):
    for number, folder in enumerate(harness):
        evaluation = read_evaluation(folder)
        content = json.loads(next(folder.rglob("results_*.json")).read_text())
        assert evaluation.model == f"models/dummy-{number}"
        assert sorted(evaluation.tasks) == sorted((*FOUR, "extra"))
        for name, task in evaluation.tasks.items():
            assert (task.items.index.tolist(), task.shots, task.version) == (list(range(30)), 0, "1.0")
            assert (task.items != "nan").all(axis=None)
            assert task.metrics["bits_per_byte"].scores.min() > 0 and task.metrics["p_right"].scores.max() < 1
            for metric in (metric for name, metric in task.metrics.items() if name not in CONTINUOUS):
                assert metric.value == content["results"][name][f"{metric.name},none"]
                if metric.name != "brier_score":
                    assert metric.stderr == content["results"][name][f"{metric.name}_stderr,none"]
                    assert metric.scores.mean() == pytest.approx(metric.value, abs=1e-12)
        assert evaluation.tasks["extra"].metrics["brier_score"].scores is None


def test_results_of_lm_eval_are_compared(harness):
    comparison = compare(*harness)
    assert labels(comparison) == ["dummy-0", "dummy-1"]
    assert [m.task for m in comparison.measures if m.headline] == [*FOUR, AVERAGE, "extra"]
    found = contrast(comparison, "hellaswag", "acc_norm")
    a, b = (model.evaluation.tasks["hellaswag"].metrics["acc_norm"].scores for model in comparison.models)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.table == (sum(a * b), sum(b * (1 - a)), sum(a * (1 - b)), sum((1 - a) * (1 - b)))
    assert "brier_score" not in {c.measure.metric for c in comparison.contrasts}


def test_average_is_over_the_headline_metrics(tmp_path, write_results):
    files = [write_results(tmp_path / str(seed), f"m/{seed}", seed=seed, items=50) for seed in (1, 2)]
    comparison = compare(*files)
    headline, plain, *continuous = (measure for measure in comparison.measures if measure.is_average)
    assert [measure.metric for measure in continuous] == [*CONTINUOUS]
    for model, file in zip(comparison.models, files, strict=True):
        results = json.loads(file.read_text())["results"]
        values = [results[task][f"{metric},none"] for task, metric in HEADLINES.items()]
        errors = [results[task][f"{metric}_stderr,none"] for task, metric in HEADLINES.items()]
        assert headline.value(model) == pytest.approx(np.mean(values))
        assert headline.stderr(model) == pytest.approx(np.linalg.norm(errors) / 4)
        assert plain.value(model) == pytest.approx(np.mean([results[task]["acc,none"] for task in FOUR]))
    average = contrast(comparison, AVERAGE, HEADLINE)
    tasks = [contrast(comparison, task, metric) for task, metric in HEADLINES.items()]
    assert average.difference == pytest.approx(np.mean([c.difference for c in tasks]))
    assert average.table == tuple(np.sum([c.table for c in tasks], axis=0))
    assert average.stderr == pytest.approx(np.linalg.norm([c.stderr for c in tasks]) / 4)


def test_missing_standard_error_is_that_of_the_items(tmp_path, write_results):
    file = write_results(tmp_path, "m/a")
    expected = read_evaluation(file).tasks["hellaswag"].metrics["acc"].stderr
    edit(file, lambda content: content["results"]["hellaswag"].pop("acc_stderr,none"))
    assert read_evaluation(file).tasks["hellaswag"].metrics["acc"].stderr == pytest.approx(expected)


def test_holm_adjusts_tasks_and_averages_over_all_models(tmp_path, write_results):
    files = [write_results(tmp_path / str(seed), f"m/{seed}", seed=seed) for seed in (1, 2, 3)]
    comparison = compare(*files)
    tasks = [c for c in comparison.contrasts if c.measure.headline and not c.measure.is_average]
    assert len(tasks) == 8
    averages = comparison.of(comparison.average)
    for family in (tasks, averages):
        assert [c.p_holm for c in family] == pytest.approx(paired.holm([c.p_value for c in family]))
    assert math.isnan(contrast(comparison, "hellaswag", "acc").p_holm)


def test_baseline_is_named_by_label_model_or_path(tmp_path, write_results):
    files = [write_results(tmp_path / str(seed), f"m/{seed}") for seed in (1, 2, 3)]
    for name in ("2", "m/2", f"{tmp_path / '2' / 'm__2'}/", str(files[1])):
        assert labels(compare(*files, baseline=name)) == ["2", "1", "3"]
    with pytest.raises(ConfigError, match="no result is called 'c'; choose from '1', '2', '3'"):
        compare(*files, baseline="c")


def test_repeated_labels_are_distinguished(tmp_path, write_results):
    files = [
        write_results(tmp_path / "x", "runs/a/export"),
        write_results(tmp_path / "y", "runs/b/export"),
        write_results(tmp_path / "first", "runs/b/export"),
        write_results(tmp_path / "z", "hub/other"),
    ]
    edit(files[2], lambda content: content["config"].update(model="hf"))
    assert labels(compare(*files)) == ["a", "b (moa)", "b (hf)", "other"]
    same = [write_results(tmp_path / name, "m/one") for name in ("p", "q")]
    assert labels(compare(*same)) == ["one (p)", "one (q)"]


def test_newest_results_of_a_folder_are_used(tmp_path, write_results):
    old = write_results(tmp_path, "m", seed=1, date="2026-11-21T09-00-00.5")
    new = write_results(tmp_path, "m", seed=2, date="2026-11-21T10-00-00")
    assert (read_evaluation(tmp_path).path, read_evaluation(tmp_path).older) == (new, 1)
    assert (read_evaluation(old).path, read_evaluation(old).older) == (old, 0)


def test_json_output_path_is_read(tmp_path, write_results):
    """`--output_path DIR/mine.json` writes DIR/mine_DATE.json."""
    file = write_results(tmp_path, "m")
    renamed = file.rename(file.with_name(file.name.replace("results_", "mine_")))
    assert read_evaluation(file.parent).path == renamed
    assert len(read_evaluation(renamed).tasks["hellaswag"].items) == 40


def test_order_of_samples_does_not_matter(tmp_path, write_results):
    files = [write_results(tmp_path / name, f"m/{name}") for name in ("a", "b")]
    path = samples_of(files[1], "hellaswag")
    lines = path.read_text().rstrip("\n").split("\n")
    path.write_text("\n".join(lines[1::2] + lines[::2]) + "\n")
    assert contrast(compare(*files), "hellaswag", "acc").discordant == 0


def test_filters_and_groups(tmp_path, write_results):
    file = write_results(tmp_path, "m", tasks={"hellaswag": ("acc",)})
    path = samples_of(file, "hellaswag")
    samples = [json.loads(line) for line in path.read_text().split("\n") if line]
    strict = [sample | {"filter": "strict", "exact_match": 1.0} for sample in samples]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in (*samples, *strict)))
    edit(file, lambda content: content["results"]["hellaswag"].update({"exact_match,strict": 1.0}))
    edit(file, lambda content: content["results"].update(group={"alias": "group", "acc,none": 0.5}))
    evaluation = read_evaluation(file)
    assert list(evaluation.tasks) == ["hellaswag"]
    assert list(evaluation.tasks["hellaswag"].metrics) == ["acc", "exact_match,strict", *CONTINUOUS]
    assert len(evaluation.tasks["hellaswag"].items) == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["n-shot"].update(arc_challenge=5), "arc_challenge: 0 shots in a, 5 in b"),
        (lambda c: c["versions"].update(hellaswag=2.0), "hellaswag: task version 1.0 in a, 2.0 in b"),
        (lambda c: c["config"].update(limit=40.0), "limit: none in a, 40 in b"),
        (lambda c: c.update(chat_template="{{x}}"), "chat_template differs between a and b"),
        (lambda c: c["results"].pop("winogrande"), "winogrande: only in a"),
        (
            lambda c: c["results"]["openbookqa"].pop("acc_norm,none"),
            "openbookqa: metrics acc, acc_norm, ",
        ),
    ],
    ids=["shots", "version", "limit", "template", "task", "metric"],
)
def test_different_settings_are_not_comparable(tmp_path, write_results, change, words):
    files = [write_results(tmp_path, f"m/{name}") for name in ("a", "b")]
    edit(files[1], change)
    with pytest.raises(DataError) as caught:
        compare(*files)
    assert str(caught.value).startswith(f"not comparable: {words}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["doc_id"] not in (17, 19, 30), "items only in a: 3, first doc_id 17"),
        (
            lambda s: s.update(doc_hash="0") if s["doc_id"] > 20 else None,
            "items with different texts: 19, first doc_id 21",
        ),
        (lambda s: s.update(target_hash="9") if s["doc_id"] == 4 else None, "items with different answers: 1,"),
        (lambda s: s.update(prompt_hash="0"), "items with different prompts: 40, first doc_id 0"),
        (lambda s: s["arguments"]["gen_args_3"].update(arg_1=" else"), "items with different requests: 40,"),
    ],
    ids=["missing", "texts", "answers", "prompts", "requests"],
)
def test_different_items_are_not_comparable(tmp_path, write_results, change, words):
    files = [write_results(tmp_path, f"m/{name}") for name in ("a", "b")]
    samples = samples_of(files[1], "hellaswag")
    edit(samples, change)
    own = [json.loads(line) for line in samples.read_text().split("\n") if line]

    def recount(content):
        content["n-samples"]["hellaswag"]["effective"] = len(own)
        for metric in ("acc", "acc_norm"):
            content["results"]["hellaswag"][f"{metric},none"] = np.mean([sample[metric] for sample in own])

    edit(files[1], recount)
    with pytest.raises(DataError, match=f"^not comparable: hellaswag: {words}"):
        compare(*files)


def test_repeated_results_are_refused(tmp_path, write_results):
    file = write_results(tmp_path, "m/a")
    with pytest.raises(DataError, match="given 2 times"):
        compare(file, tmp_path)


def damaged(task, change):
    return lambda file: edit(samples_of(file, task), change)


def cut(path):
    path.write_text(path.read_text()[:1000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "not valid JSON"),
        (lambda file: file.write_text("[1]"), "content has the wrong format"),
        (lambda file: edit(file, lambda c: c["config"].update(limit="x")), "config.limit has the wrong format"),
        (lambda file: samples_of(file, "hellaswag").unlink(), "run lm_eval with --log_samples"),
        (lambda file: cut(samples_of(file, "hellaswag")), "is not valid JSON"),
        (lambda file: samples_of(file, "hellaswag").write_text(""), "there are no samples"),
        (damaged("hellaswag", lambda s: s["doc_id"] < 30), "30 items, but results"),
        (damaged("hellaswag", lambda s: s.update(doc_id=3)), "doc_id 3 occurs twice"),
        (damaged("hellaswag", lambda s: s.pop("doc_id")), "line 1 has no integer doc_id"),
        (damaged("hellaswag", lambda s: s.update(acc=1 - s["acc"])), "acc,none is 0."),
        (damaged("hellaswag", lambda s: s.pop("acc")), "acc,none is missing in the samples"),
        (lambda file: edit(file, lambda c: c["results"].update(hellaswag={"bypass,none": 999})), "have no metric"),
        (lambda file: edit(file, lambda c: c.update(configs={"other": {}})), "no results of single tasks"),
    ],
    ids=[
        "cut", "list", "limit", "no-samples", "cut-samples", "empty-samples", "few", "twice", "no-id", "accuracy",
        "no-metric", "no-metrics", "groups",
    ],
)  # fmt: skip
def test_damaged_results_are_reported_in_one_line(tmp_path, write_results, damage, words):
    file = write_results(tmp_path, "m/a", seed=3, skill=0.3)
    damage(file)
    with pytest.raises(DataError) as caught:
        read_evaluation(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_paths_without_results_are_refused(tmp_path, write_results):
    file = write_results(tmp_path / "both", "m/a")
    write_results(tmp_path / "both", "m/b")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "empty", r"there is no results_\*.json"),
        (tmp_path / "both", "there are results in 2 folders .*m__a, .*m__b.*; give one of them"),
        (samples_of(file, "hellaswag"), "this is a samples file"),
    ):
        with pytest.raises(DataError, match=words):
            read_evaluation(path)
