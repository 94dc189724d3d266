"""MoALM against lm-eval's HFLM on lm-eval's task files; irregular requests, several processes."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from moa_eval import evaluator
from moa_eval.evaluator import lm_eval_evaluator
from moa_eval.harness import MoALM, ModelError
from moa_eval.harness.prefix_tree import Request, truncated
from moa_train.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and datasets

TASKS = {"arc_challenge": 32, "hellaswag": 32, "openbookqa": 32, "winogrande": 16}  # requests in ITEMS
TASK_FOLDERS = [
    str(Path(lm_eval.__file__).parent / "tasks" / name) for name in ("arc", "hellaswag", "openbookqa", "winogrande")
]
CONTEXTS = ["", "A man is", "A man is ", "A man is  \n", "<s>A man", "<s>", "Über", "A man sits. " * 30]
CONTINUATIONS = [" sitting", "sitting", " s", "x", "<s>", " <s>a", "  two", "\n", " sitting on a roof", "</s>"]
PAIRS = [pair for pair in product(CONTEXTS, CONTINUATIONS) if pair != ("", "<s>")]  # the prefix token alone
LONG = " sitting" * 30
NOT_SCORED = (-math.inf, False)


def instances(pairs, kind="loglikelihood", task="task"):
    """Requests as lm-eval's tasks make them, one per document."""
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=(task, index, 1))
        for index, pair in enumerate(pairs)
    ]


def score(lm, pairs):
    return lm.loglikelihood(instances(pairs), disable_tqdm=True)


def assert_same(found, expected):
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def assert_scores_of_hf(hf, moa, pairs):
    assert_same(score(moa, pairs), score(hf, pairs))


def evaluate(lm, shots=None) -> Any:
    manager = TaskManager(include_path=TASK_FOLDERS, include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=list(TASKS), num_fewshot=shots, task_manager=manager, bootstrap_iters=0, log_samples=True
    )


@pytest.mark.parametrize(("name", "shots"), [("llama", 2), ("moa", 0)])
def test_four_tasks_match_hf(checkpoints, offline, name, shots):
    results = [evaluate(cls(str(checkpoints / name), device="cpu"), shots) for cls in (HFLM, MoALM)]
    for task, count in TASKS.items():
        expected, found = (
            [response for sample in result["samples"][task] for (response,) in sample["resps"]] for result in results
        )
        assert len(expected) == count
        assert_same(found, expected)
        metrics = [{key: value for key, value in r["results"][task].items() if key.startswith("acc")} for r in results]
        assert metrics[0] == metrics[1]
        assert "acc,none" in metrics[0]


@pytest.mark.parametrize("max_length", [None, 16])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "adds_bos"])
def test_tokens_are_those_of_hf(checkpoints, tokenizer, tmp_path, max_length, add_bos_token, adds_bos):
    if adds_bos:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = template
    arguments = {"tokenizer": tokenizer, "max_length": max_length, "add_bos_token": add_bos_token, "device": "cpu"}
    hf, moa = (cls(str(checkpoints / "llama"), **arguments) for cls in (HFLM, MoALM))
    recorded = {}
    for lm in (hf, moa):
        original = lm._loglikelihood_tokens
        lm._loglikelihood_tokens = lambda requests, original=original, lm=lm, **kwargs: (
            recorded.update({lm: requests}) or original(requests, **kwargs)
        )
    assert_scores_of_hf(hf, moa, PAIRS)
    assert recorded[moa] == [(pair, *truncated(Request(*ids), moa.max_length)) for pair, *ids in recorded[hf]]


def test_each_distinct_string_is_tokenized_once(both, monkeypatch):
    _, moa = both
    calls = []
    call = type(moa.tokenizer).__call__
    monkeypatch.setattr(
        type(moa.tokenizer), "__call__", lambda self, text, **kwargs: calls.append(text) or call(self, text, **kwargs)
    )
    pairs = [("A man is", " sitting"), ("A man is", " standing"), ("A man is ", "up"), ("", "alone"), ("", "alone")]
    score(moa, pairs)
    assert calls == [["A man is", "A man is sitting", "A man is standing", "A man is up"], ["alone"]]


def test_rolling_likelihood_and_generation_match_hf(both, monkeypatch):
    texts = [("A man is sitting on a roof. " * count,) for count in (1, 2, 9)]
    for lm in both:
        monkeypatch.setattr(lm, "_max_length", 32)
    expected, found = (lm.loglikelihood_rolling(instances(texts), disable_tqdm=True) for lm in both)
    assert found == pytest.approx(expected, abs=1e-3)  # sums over up to 9 windows
    arguments = [("A man is", {"until": ["."], "max_gen_toks": 8}), ("The", {"until": [], "max_gen_toks": 8})]
    for lm in both:
        monkeypatch.setattr(lm, "_max_length", None)
        score(lm, PAIRS[20:22])  # must not change how the model generates
    expected, found = (lm.generate_until(instances(arguments, "generate_until"), disable_tqdm=True) for lm in both)
    assert found == expected


@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["trees", "hf_code"])
def test_requests_that_hf_fails_at_are_scored_and_counted(checkpoints, name, caplog):
    hf, moa = (cls(str(checkpoints / name), device="cpu", max_length=16) for cls in (HFLM, MoALM))
    a, the, start = (moa.tok_encode(text) for text in ("A", " the", "The"))
    assert [len(ids) for ids in (a, the, start)] == [1] * 3
    cut = moa.tok_encode(LONG)[-17:]
    prefix = [moa.prefix_token_id]
    irregular = {  # pair -> tokens of context and continuation that are scored
        ("A t", "he"): (a, the),
        ("Th", "e"): (prefix, start),  # two tokens become one
        (" ", "A"): (prefix, moa.tok_encode(" A")),
        ("A", LONG): (cut[:1], cut[1:]),
        ("A", ""): None,
        ("", "<s>"): None,
    }
    for pair in irregular:
        with pytest.raises(AssertionError):
            score(hf, [pair])
    regular = [("A man", " is"), ("A man sits." * 9, " up")]
    tokens = [(None, *ids) for ids in irregular.values() if ids]
    expected = [*score(hf, regular), *hf._loglikelihood_tokens(tokens, disable_tqdm=True), NOT_SCORED, NOT_SCORED]
    assert_same(score(moa, [*regular, *irregular]), expected)
    counts = {"merged": 2, "continuation_truncated": 1, "context_truncated": 1, "empty": 2}
    info = moa.get_model_info()
    assert (info["irregular_items"], info["truncation"]) == ({"task": counts}, "left")
    assert caplog.text.count("; items: task ") == len(counts)  # one warning per kind
    assert "without BOS, as by hf; items: task 1 (first: task, doc_id 1)" in caplog.text


@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["trees", "hf_code"])
def test_truncation_policies(checkpoints, name):
    pairs = [("A man", " is"), ("A man sits. " * 9, " up"), ("A", LONG)]
    arguments = {"device": "cpu", "max_length": 16}
    left = score(MoALM(str(checkpoints / name), truncation=True, **arguments), pairs)
    skip = MoALM(str(checkpoints / name), truncation="skip", **arguments)
    assert_same(score(skip, pairs), [left[0], NOT_SCORED, NOT_SCORED])
    assert skip.get_model_info()["irregular_items"] == {"task": {"skipped": 2}}
    error = MoALM(str(checkpoints / name), truncation="error", **arguments)
    assert len(score(error, [pairs[0], ("A", "")])) == 2
    with pytest.raises(ModelError, match=r"doc_id 1 of task has \d+ tokens of context and 2 of .*max_length=16"):
        score(error, pairs)


def test_answers_and_irregular_items_are_cached(checkpoints, tmp_path, monkeypatch):
    """Each answer is cached as soon as it is scored, and a second run scores nothing."""
    pairs = [("A man", " is"), ("A man sits. " * 9, " up"), ("A", LONG), ("", "x")]
    partial, answers, counts = [], [], []
    for _ in range(2):
        moa = MoALM(str(checkpoints / "llama"), device="cpu", max_length=16)
        lm = CachingLM(moa, str(tmp_path / "answers.db"))
        monkeypatch.setattr(moa.cache_hook, "add_partial", lambda *answer: partial.append(answer))
        answers.append(lm.loglikelihood(instances(pairs)))
        counts.append(moa.get_model_info()["irregular_items"])
    assert sorted(partial) == sorted(("loglikelihood", *entry) for entry in zip(pairs, answers[0], strict=True))
    assert answers[0] == answers[1]
    assert counts == [{"task": {"context_truncated": 1, "continuation_truncated": 1}}] * 2


def test_unsupported_model_is_scored_by_hf_code(checkpoints, caplog):
    hf, moa = (cls(str(checkpoints / "bloom"), device="cpu", max_length=64) for cls in (HFLM, MoALM))
    for _ in range(2):
        assert_scores_of_hf(hf, moa, PAIRS[:20])
    [warning] = [record.message for record in caplog.records if "HFLM's code" in record.message]
    assert "position_ids" in warning


def test_loaded_model_is_accepted(both, checkpoints, tokenizer):
    hf, _ = both
    moa = MoALM(LlamaForCausalLM.from_pretrained(checkpoints / "llama"), tokenizer=tokenizer)
    assert_scores_of_hf(hf, moa, PAIRS[:20])
    assert get_model("moa") is MoALM


def test_missing_checkpoint_argument():
    with pytest.raises(ModelError, match="pass --model_args pretrained=DIR"):
        MoALM(device="cpu")


def test_nan_scores_are_an_error(both, monkeypatch):
    _, moa = both
    score(moa, PAIRS[20:22])
    monkeypatch.setattr(moa.model.model.norm.weight, "data", torch.full_like(moa.model.model.norm.weight, torch.nan))
    with pytest.raises(ModelError, match=r"gives NaN in torch.float32"):
        score(moa, PAIRS[20:22])


# lm-eval's command line with an index of four tasks only, a note of the scored strings, and one process killed after
# some answers.
PROCESS = """
import atexit, json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from lm_eval.api.model import CacheHook
from lm_eval.tasks import TaskManager
import moa_eval.__main__, moa_eval.harness
from torch.distributed import is_initialized

atexit.register(lambda: is_initialized() and os._exit(9))  # the last to run

here, folders, killed, left = Path(sys.argv.pop(1)), json.loads(sys.argv.pop(1)), sys.argv.pop(1), [20]
rank = os.environ.get("LOCAL_RANK", "0")
initialize = TaskManager.__init__
TaskManager.__init__ = lambda self, **k: initialize(self, include_path=folders, include_defaults=False)
score, keep = moa_eval.harness.MoALM._loglikelihood_tokens, CacheHook.add_partial

def noted(self, requests, **kwargs):
    note = {"rank": self.rank, "world": self.world_size, "scored": [request[0] for request in requests]}
    (here / f"process{rank}.json").write_text(json.dumps(note))
    return score(self, requests, **kwargs)

def kept(self, *answer):
    keep(self, *answer)
    left[0] -= 1
    if left[0] == 0 and rank == killed:
        time.sleep(1)  # the cache is written by a thread
        os.kill(os.getpid(), signal.SIGKILL)

moa_eval.harness.MoALM._loglikelihood_tokens, CacheHook.add_partial = noted, kept
moa_eval.__main__.main()
"""


@pytest.fixture
def run(checkpoints, tmp_path, offline):
    """Run lm-eval's command line on several processes; return the finished process and the note of each rank."""
    (tmp_path / "process.py").write_text(PROCESS)
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    settings |= {"PYTHONPATH": str(Path(__file__).parents[3]), "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def start(processes, *arguments, killed="nobody"):
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch = [*launch, "--main_process_port", "0"] if processes > 1 else []
        for note in tmp_path.glob("process*.json"):
            note.unlink()
        command = [sys.executable, *launch, str(tmp_path / "process.py"), str(tmp_path), json.dumps(TASK_FOLDERS)]
        command += [killed, "--model", "moa", "--model_args", f"pretrained={checkpoints / 'llama'},max_length=64"]
        command += ["--tasks", "openbookqa,winogrande", "--output_path", str(tmp_path / "out"), "--log_samples"]
        done = subprocess.run([*command, *arguments], env=os.environ | settings, capture_output=True, text=True)
        return done, [json.loads(path.read_text()) for path in sorted(tmp_path.glob("process*.json"))]

    return start


def assert_results_of_one_process(checkpoints, out):
    """Check for a single results file with the accuracies, answers and counts of a run in this process."""
    alone = evaluate(MoALM(str(checkpoints / "llama"), device="cpu", max_length=64), shots=0)
    [result] = [json.loads(path.read_text()) for path in out.rglob("results_*.json")]
    for task in ("openbookqa", "winogrande"):
        assert result["results"][task]["acc,none"] == alone["results"][task]["acc,none"]
        [path] = out.rglob(f"samples_{task}_*.jsonl")
        samples = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
        assert len(samples) == len(alone["samples"][task]) == 8
        for sample in alone["samples"][task]:
            for (ours,), (theirs,) in zip(samples[sample["doc_id"]]["resps"], sample["resps"], strict=True):
                assert float(ours[0]) == pytest.approx(theirs[0], abs=1e-4)
    counts = alone["config"]["irregular_items"]
    assert counts["openbookqa"]["context_truncated"] > 0
    assert result["config"]["irregular_items"] == {"openbookqa": counts["openbookqa"]}


def scored(notes):
    return [tuple(pair) for note in notes for pair in note["scored"]]


@pytest.mark.slow
def test_two_processes_share_the_work(checkpoints, tmp_path, run):
    done, notes = run(2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(note["rank"], note["world"]) for note in notes] == [(0, 2), (1, 2)]
    pairs = scored(notes)
    assert len(pairs) == len(set(pairs)) == TASKS["openbookqa"] + TASKS["winogrande"]
    assert_results_of_one_process(checkpoints, tmp_path / "out")
    assert done.stdout.rstrip().splitlines()[-1].startswith("|winogrande")  # the table is the last output
    for once in ("Selected tasks:", "Task: winogrande", "truncated from the left"):
        assert done.stderr.count(once) == 1, once


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "killed"), [(1, "0"), (2, "1")])
def test_killed_evaluation_resumes_from_its_cache(checkpoints, tmp_path, run, processes, killed):
    cache = ("--use_cache", str(tmp_path / "answers"))
    done, notes = run(processes, *cache, killed=killed)
    assert done.returncode != 0
    assert not list((tmp_path / "out").rglob("results_*.json"))
    done, later = run(processes, *cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(scored(later)) <= len(scored(notes)) - 20
    assert_results_of_one_process(checkpoints, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_command_line_reports_a_missing_checkpoint_in_one_line(run, processes):
    done, _ = run(processes, "--model_args", "pretrained=/nonexistent/model")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("moa: ")]
    assert set(lines) == {"moa: checkpoint folder /nonexistent/model does not exist or is not a folder"}
    assert "ModelError" not in done.stderr


def test_evaluator_gives_the_metrics_of_hf(checkpoints, tokenizer, offline, monkeypatch):
    initialize = TaskManager.__init__
    folders = {"include_path": TASK_FOLDERS, "include_defaults": False}
    monkeypatch.setattr(TaskManager, "__init__", lambda self: initialize(self, **folders))
    monkeypatch.setattr(evaluator, "_task_manager", TaskManager)
    task = SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"evaluators.lm_eval.tasks is 'openbookqq'; it must be tasks of lm-eval"):
        lm_eval_evaluator(task, tasks=["openbookqa", "openbookqq"])
    evaluate_model = lm_eval_evaluator(task, tasks=["openbookqa", "winogrande"], limit=5, num_fewshot=1)
    found = dict(evaluate_model(AutoModelForCausalLM.from_pretrained(checkpoints / "moa")))
    manager, hf = TaskManager(), HFLM(str(checkpoints / "moa"), device="cpu")
    names = ["openbookqa", "winogrande"]
    results: Any = lm_eval.simple_evaluate(
        hf, tasks=names, limit=5, num_fewshot=1, task_manager=manager, bootstrap_iters=0
    )
    expected = {f"{name}/acc": results["results"][name]["acc,none"] for name in names}
    expected["openbookqa/acc_norm"] = results["results"]["openbookqa"]["acc_norm,none"]
    expected["average/acc"] = np.mean([expected[f"{name}/acc"] for name in names])
    bits = []
    for sample in results["samples"]["openbookqa"]:
        answer, likelihood = (sample[key][int(sample["target"])] for key in ("arguments", "filtered_resps"))
        bits.append(-likelihood[0] / math.log(2) / len(answer[1].encode()))
    assert found["openbookqa/bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-5)
    both = [found[f"{name}/bits_per_byte"] for name in names]
    assert found["average/bits_per_byte"] == pytest.approx(np.mean(both))
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    measured = {f"{name}/{metric}" for name in [*names, "average"] for metric in ("bits_per_byte", "p_right")}
    assert found.keys() == expected.keys() | measured
