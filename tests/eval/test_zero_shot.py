import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from moa_eval.zero_shot import paired
from moa_eval.zero_shot.contrasts import AVERAGE, HEADLINE, compare_evaluations
from moa_eval.zero_shot.output import ResultsError, read_evaluation
from moa_train.errors import DataError as NotComparableError

FOUR = ("arc_challenge", "hellaswag", "openbookqa", "winogrande")
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


def test_what_the_harness_wrote_is_read(harness):
    for number, folder in enumerate(harness):
        evaluation = read_evaluation(folder)
        content = json.loads(next(folder.rglob("results_*.json")).read_text())
        assert evaluation.model == f"models/dummy-{number}"
        assert sorted(evaluation.tasks) == sorted((*FOUR, "extra"))
        for name, task in evaluation.tasks.items():
            assert (len(task.items), task.shots, task.version) == (30, 0, "1.0")
            assert [item.doc_id for item in task.items] == list(range(30))
            for metric in task.metrics.values():
                assert metric.value == content["results"][name][f"{metric.name},none"]
                if metric.name != "brier_score":
                    assert metric.stderr == content["results"][name][f"{metric.name}_stderr,none"]
                    assert metric.scores.mean() == pytest.approx(metric.value, abs=1e-12)
                    expected = np.std(metric.scores, ddof=1) / math.sqrt(30)
                    assert metric.stderr == pytest.approx(expected, rel=1e-9)
        assert evaluation.tasks["extra"].metrics["brier_score"].scores is None


def test_what_the_harness_wrote_is_compared(harness):
    comparison = compare_evaluations([read_evaluation(folder) for folder in harness])
    assert comparison.labels == ("dummy-0", "dummy-1")
    assert comparison.tasks == (*FOUR, "extra")
    contrast = comparison.find("hellaswag", "acc_norm", 1)
    sides = (evaluation.tasks["hellaswag"].metrics["acc_norm"].scores for evaluation in comparison.evaluations)
    a, b = (np.asarray(scores) for scores in sides)
    assert contrast.difference == pytest.approx(b.mean() - a.mean())
    assert contrast.table == (sum(a * b), sum(b * (1 - a)), sum(a * (1 - b)), sum((1 - a) * (1 - b)))
    assert comparison.find("extra", "brier_score", 1) is None


def test_the_harness_computes_the_same_hashes_of_items(harness, tmp_path):
    """Releases before 0.4.3 kept none: they are computed as the harness does."""
    file = next(harness[0].rglob("results_*.json"))
    copy = tmp_path / file.name
    copy.write_text(file.read_text())
    for path in file.parent.glob("samples_*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
        edit(tmp_path / path.name, lambda sample: [sample.pop(f"{key}_hash") for key in ("doc", "prompt", "target")])
    stripped, whole = read_evaluation(copy), read_evaluation(file)
    for name in FOUR:
        assert stripped.tasks[name].items == whole.tasks[name].items


def test_the_average_is_of_the_four_headlines(tmp_path, write_results):
    files = [write_results(tmp_path / str(seed), f"m/{seed}", seed=seed, items=50 + 0 * seed) for seed in (1, 2)]
    comparison = compare_evaluations([read_evaluation(file) for file in files])
    contents = [json.loads(file.read_text())["results"] for file in files]
    keys = [
        ("arc_challenge", "acc_norm"),
        ("hellaswag", "acc_norm"),
        ("openbookqa", "acc_norm"),
        ("winogrande", "acc"),
    ]
    for model, content in enumerate(contents):
        score = comparison.score(AVERAGE, HEADLINE, model)
        assert score.value == pytest.approx(np.mean([content[task][f"{metric},none"] for task, metric in keys]))
        errors = [content[task][f"{metric}_stderr,none"] for task, metric in keys]
        assert score.stderr == pytest.approx(np.linalg.norm(errors) / 4)
        plain = comparison.score(AVERAGE, "acc", model)
        assert plain.value == pytest.approx(np.mean([content[task]["acc,none"] for task in FOUR]))
    contrast = comparison.find(AVERAGE, HEADLINE, 1)
    own = [comparison.find(task, metric, 1) for task, metric in keys]
    assert contrast.difference == pytest.approx(np.mean([c.difference for c in own]))
    assert contrast.table == tuple(np.sum([c.table for c in own], axis=0))
    assert contrast.stderr == pytest.approx(np.linalg.norm([c.stderr for c in own]) / 4)
    assert contrast.p_holm == contrast.p_value  # one model: one test
    assert [c.p_holm for c in own] == pytest.approx(paired.holm([c.p_value for c in own]))
    assert math.isnan(comparison.find("hellaswag", "acc", 1).p_holm)


def test_several_models_are_corrected_together(tmp_path, write_results):
    files = [write_results(tmp_path / str(seed), f"m/{seed}", seed=seed) for seed in (1, 2, 3)]
    comparison = compare_evaluations([read_evaluation(file) for file in files], baseline="2")
    assert comparison.labels == ("2", "1", "3")
    for name in ("m/2", f"{tmp_path / '2' / 'm__2'}/", str(files[1])):
        assert compare_evaluations([read_evaluation(file) for file in files], name).labels == ("2", "1", "3")
    tests = [c for c in comparison.contrasts if c.headline and c.task != AVERAGE]
    assert len(tests) == 8
    assert [c.p_holm for c in tests] == pytest.approx(paired.holm([c.p_value for c in tests]))
    averages = [comparison.find(AVERAGE, HEADLINE, model) for model in (1, 2)]
    assert [c.p_holm for c in averages] == pytest.approx(paired.holm([c.p_value for c in averages]))


def test_equal_names_are_told_apart(tmp_path, write_results):
    files = [
        write_results(tmp_path / "x", "runs/a/export"),
        write_results(tmp_path / "y", "runs/b/export"),
        write_results(tmp_path / "first", "runs/b/export"),
        write_results(tmp_path / "z", "hub/other"),
    ]
    edit(files[2], lambda content: content["config"].update(model="hf"))
    labels = compare_evaluations([read_evaluation(file) for file in files]).labels
    assert labels == ("export (a)", "export (b) (moa)", "export (b) (hf)", "other")
    same = [write_results(tmp_path / name, "m/one") for name in ("p", "q")]
    assert compare_evaluations([read_evaluation(file) for file in same]).labels == ("one (p)", "one (q)")


def test_the_newest_of_several_is_taken_and_said(tmp_path, write_results):
    old = write_results(tmp_path, "m", seed=1, date="2026-11-21T09-00-00.5")
    new = write_results(tmp_path, "m", seed=2, date="2026-11-21T10-00-00")
    evaluation = read_evaluation(tmp_path)
    assert evaluation.path == new
    assert evaluation.notes == (f"{tmp_path} holds 2 results: {new.name} is the newest; 1 older not used.",)
    assert read_evaluation(old).path == old and not read_evaluation(old).notes


def test_results_of_a_json_output_path_are_read(tmp_path, write_results):
    """`--output_path DIR/mine.json` gives DIR/mine_DATE.json and the samples beside it."""
    file = write_results(tmp_path, "m")
    renamed = file.rename(file.with_name(file.name.replace("results_", "mine_")))
    assert read_evaluation(file.parent).path == renamed
    assert len(read_evaluation(renamed).tasks["hellaswag"].items) == 40


def test_results_of_old_releases_are_read(tmp_path, write_results):
    """Up to 0.4.2: results.json, the model's arguments as a text, samples as one JSON array without hashes."""
    new = write_results(tmp_path / "new", "m")
    file = write_results(tmp_path / "old", "m")
    for task in FOUR:
        path = samples_of(file, task)
        samples = [json.loads(line) for line in path.read_text().split("\n") if line]
        for sample in samples:
            for key in ("doc_hash", "prompt_hash", "target_hash", "filter", "metrics"):
                del sample[key]
            sample["arguments"] = [list(request.values()) for request in sample["arguments"].values()]
            sample["target"] = int(sample["target"])
        path.unlink()
        (file.parent / f"pretrained__m_{task}.jsonl").write_text(json.dumps(samples, indent=2))
    edit(file, lambda content: [content.pop("n-samples"), content["config"].update(model_args="pretrained=m,dtype=x")])
    edit(file, lambda content: [content.pop("model_name"), content.pop("n-shot")])
    file.rename(file.with_name("results.json"))
    evaluation = read_evaluation(tmp_path / "old")
    assert evaluation.model == "m" and evaluation.config["model_args"]["dtype"] == "x"
    comparison = compare_evaluations([read_evaluation(new), evaluation])
    assert comparison.find(AVERAGE, HEADLINE, 1).discordant == 0


def test_ranks_may_write_items_in_any_order(tmp_path, write_results):
    files = [write_results(tmp_path / name, f"m/{name}") for name in ("a", "b")]
    path = samples_of(files[1], "hellaswag")
    lines = path.read_text().rstrip("\n").split("\n")
    path.write_text("\n".join(lines[1::2] + lines[::2]) + "\n")
    assert [item.doc_id for item in read_evaluation(files[1]).tasks["hellaswag"].items] == list(range(40))
    assert compare_evaluations([read_evaluation(file) for file in files]).find("hellaswag", "acc", 1).discordant == 0


def test_filters_and_groups(tmp_path, write_results):
    """One line per item and filter; a group has results but no items of its own."""
    file = write_results(tmp_path, "m", tasks={"hellaswag": ("acc",)})
    path = samples_of(file, "hellaswag")
    strict = [
        json.loads(line) | {"filter": "strict", "exact_match": 1.0} for line in path.read_text().split("\n") if line
    ]
    path.write_text(path.read_text() + "".join(json.dumps(sample) + "\n" for sample in strict))
    edit(file, lambda content: content["results"]["hellaswag"].update({"exact_match,strict": 1.0}))
    edit(file, lambda content: content["results"].update(group={"alias": "group", "acc,none": 0.5}))
    evaluation = read_evaluation(file)
    assert list(evaluation.tasks) == ["hellaswag"]
    assert list(evaluation.tasks["hellaswag"].metrics) == ["acc", "exact_match,strict"]
    assert len(evaluation.tasks["hellaswag"].items) == 40
    assert math.isnan(evaluation.tasks["hellaswag"].metrics["exact_match,strict"].stderr)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["n-shot"].update(arc_challenge=5), "arc_challenge: 0 shots in a, 5 in b"),
        (lambda c: c["versions"].update(hellaswag=2.0), "hellaswag: task version 1.0 in a, 2.0 in b"),
        (lambda c: c["config"].update(limit=40.0), "limit: none in a, 40 in b"),
        (lambda c: c.update(chat_template="{{x}}"), "chat_template: none in a, set in b"),
        (lambda c: c.update(system_instruction="Be right."), "system_instruction: none in a, set in b"),
        (lambda c: c["results"].pop("winogrande"), "winogrande: only in a"),
        (
            lambda c: c["results"]["openbookqa"].pop("acc_norm,none"),
            "openbookqa: metrics acc, acc_norm in a, acc in b",
        ),
    ],
    ids=["shots", "version", "limit", "template", "instruction", "task", "metric"],
)
def test_other_settings_are_refused(tmp_path, write_results, change, words):
    files = [write_results(tmp_path, f"m/{name}") for name in ("a", "b")]
    edit(files[1], change)
    with pytest.raises(NotComparableError) as caught:
        compare_evaluations([read_evaluation(file) for file in files])
    assert str(caught.value) == f"not comparable: {words}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["doc_id"] not in (17, 19, 30), "3 items only in a, first doc_id 17"),
        (lambda s: s.update(doc_hash="0") if s["doc_id"] > 20 else None, "19 items with other texts"),
        (lambda s: s.update(target="9") if s["doc_id"] == 4 else None, "1 item with other answers"),
        (lambda s: s.update(prompt_hash="0"), "40 items with other prompts"),
        (lambda s: s["arguments"]["gen_args_3"].update(arg_1=" else"), "40 items with other requests"),
    ],
    ids=["missing", "texts", "answers", "prompts", "requests"],
)
def test_other_items_are_refused(tmp_path, write_results, change, words):
    files = [write_results(tmp_path, f"m/{name}") for name in ("a", "b")]
    samples = samples_of(files[1], "hellaswag")
    edit(samples, change)
    own = [json.loads(line) for line in samples.read_text().split("\n") if line]

    def recount(content):
        content["n-samples"]["hellaswag"]["effective"] = len(own)
        for metric in ("acc", "acc_norm"):
            content["results"]["hellaswag"][f"{metric},none"] = np.mean([sample[metric] for sample in own])

    edit(files[1], recount)
    with pytest.raises(NotComparableError) as caught:
        compare_evaluations([read_evaluation(file) for file in files])
    assert str(caught.value).startswith(f"not comparable: hellaswag: {words}")
    if "other" in words:
        assert " in b than in a, first doc_id " in str(caught.value)


def test_many_reasons_are_cut_short(tmp_path, write_results):
    files = [write_results(tmp_path / "x", "m/a"), write_results(tmp_path / "y", "m/b", shots=5, limit=7)]
    with pytest.raises(NotComparableError, match=r"; openbookqa: 0 shots in a, 5 in b; and 1 more$"):
        compare_evaluations([read_evaluation(file) for file in files])


def test_the_same_result_twice_and_an_unknown_baseline_are_refused(tmp_path, write_results):
    file = write_results(tmp_path, "m/a")
    with pytest.raises(NotComparableError, match="given 2 times"):
        compare_evaluations([read_evaluation(file), read_evaluation(tmp_path)])
    with pytest.raises(NotComparableError, match=r"no result is called 'c'; they are called 'a'"):
        compare_evaluations([read_evaluation(file)], baseline="c")
    with pytest.raises(ValueError, match="at least one"):
        compare_evaluations([])


def cut(path, part):
    text = path.read_text()
    path.write_text(text[: int(len(text) * part)])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: cut(file, 0.5), "not valid JSON"),
        (lambda file: file.write_text("[1]"), "holds a list, not an object"),
        (lambda file: file.write_text('{"results": {}}'), "has no results"),
        (lambda file: samples_of(file, "hellaswag").unlink(), "run lm_eval with --log_samples"),
        (lambda file: cut(samples_of(file, "hellaswag"), 0.5), "is not valid JSON"),
        (lambda file: samples_of(file, "hellaswag").write_text(""), "holds no samples"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s["doc_id"] < 30), "holds 30 items, but results"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s.update(doc_id=3)), "doc_id 3 occurs twice"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s.pop("doc_id")), "line 1 has no whole number"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s.update(acc=1 - s["acc"])), "hellaswag: acc is"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s.pop("acc")), "acc is not in the samples"),
        (lambda file: edit(samples_of(file, "hellaswag"), lambda s: s.update(acc=math.nan)), "acc is nan over the"),
        (lambda file: edit(file, lambda c: c["results"].update(hellaswag={"bypass,none": 999})), "have no metric"),
        (lambda file: edit(file, lambda c: c.update(configs={"other": {}})), "results of groups only"),
    ],
    ids=[
        "cut", "list", "empty", "no-samples", "cut-samples", "empty-samples", "few", "twice", "no-id", "accuracy",
        "no-metric", "nan", "no-metrics", "groups",
    ],
)  # fmt: skip
def test_broken_results_are_refused_in_one_line(tmp_path, write_results, damage, words):
    file = write_results(tmp_path, "m/a", seed=3, skill=0.3)
    damage(file)
    with pytest.raises(ResultsError) as caught:
        read_evaluation(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_results_folder_is_refused(tmp_path, write_results):
    file = write_results(tmp_path / "both", "m/a")
    write_results(tmp_path / "both", "m/b")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "empty", r"holds no results_\*.json"),
        (tmp_path / "both", "holds results of 2 folders .*m__a, .*m__b.*; give one of them"),
        (samples_of(file, "hellaswag"), "holds samples; give the results file"),
    ):
        with pytest.raises(ResultsError, match=words):
            read_evaluation(path)


def test_not_finite_likelihoods_are_counted(tmp_path, write_results):
    file = write_results(tmp_path, "m/a")
    edit(
        samples_of(file, "hellaswag"),
        lambda s: s["filtered_resps"][2].__setitem__(0, "nan") if s["doc_id"] < 3 else None,
    )
    assert [task.not_finite for task in read_evaluation(file).tasks.values()] == [0, 3, 0, 0]
