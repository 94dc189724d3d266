"""MoALM against lm-eval's own HFLM: the four tasks from lm-eval's unmodified files, and everything around scoring."""

import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import lm_eval
import pytest
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

from moa_eval.harness import MoALM, ModelError
from moa_eval.harness.prefix_tree import Request, truncated
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

ITEMS = Path(__file__).parent / "items"
TASKS = {"arc_challenge": 32, "hellaswag": 32, "openbookqa": 32, "winogrande": 16}  # requests in ITEMS
TASK_FOLDERS = [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in ("arc", "hellaswag", "openbookqa")]
TASK_FOLDERS.append(str(Path(lm_eval.__file__).parent / "tasks" / "winogrande"))
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE trained on the items; nothing is added to a text unless asked for."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    bpe.train([str(path) for path in sorted(ITEMS.rglob("*.jsonl"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Folders with random weights: a Llama, one of ours, one that is scored by HFLM's code."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "moa": MoALlamaForCausalLM(MoALlamaConfig(**SIZES, ffn_variant="qdmoa")),
        "bloom": BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def both(checkpoints):
    """HFLM and MoALM of the same checkpoint."""
    return tuple(cls(str(checkpoints / "llama"), device="cpu", dtype="float32") for cls in (HFLM, MoALM))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The items stand where lm-eval's task files look for data sets, and nothing asks a network."""
    monkeypatch.chdir(ITEMS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def requests_of(pairs, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


def assert_equal_scores(hf, moa, pairs):
    expected = hf.loglikelihood(requests_of(pairs), disable_tqdm=True)
    got = moa.loglikelihood(requests_of(pairs), disable_tqdm=True)
    for pair, theirs, ours in zip(pairs, expected, got, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4), pair
        assert ours[1] == theirs[1], pair


def evaluate(lm, shots=None) -> Any:
    manager = TaskManager(include_path=TASK_FOLDERS, include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=list(TASKS), num_fewshot=shots, task_manager=manager, bootstrap_iters=0, log_samples=True
    )


@pytest.mark.filterwarnings("default")  # lm-eval and datasets warn for reasons of their own
@pytest.mark.parametrize(("name", "shots"), [("llama", 2), ("moa", 0)])
def test_the_four_tasks(checkpoints, offline, name, shots):
    """Every log-likelihood to 1e-4, every greedy flag and every accuracy; with examples, contexts are long."""
    results = [evaluate(cls(str(checkpoints / name), device="cpu"), shots) for cls in (HFLM, MoALM)]
    for task, count in TASKS.items():
        samples = [sorted(result["samples"][task], key=lambda sample: sample["doc_id"]) for result in results]
        pairs = [
            (theirs[0], ours[0])
            for hf, moa in zip(*samples, strict=True)
            for theirs, ours in zip(hf["resps"], moa["resps"], strict=True)
        ]
        assert len(pairs) == count
        for theirs, ours in pairs:
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
            assert ours[1] == theirs[1]
        metrics = [{key: value for key, value in r["results"][task].items() if key.startswith("acc")} for r in results]
        assert metrics[0] == metrics[1]
        assert "acc,none" in metrics[0]


CONTEXTS = ["", "A man is", "A man is ", "A man is  \n", "<s>A man", "<s>", "Über", "A man sits. " * 30]
CONTINUATIONS = [" sitting", "sitting", " s", "x", "<s>", " <s>a", "  two", "\n", " sitting on a roof", "</s>"]
PAIRS = [pair for pair in product(CONTEXTS, CONTINUATIONS) if pair != ("", "<s>")]  # the prefix token alone


@pytest.mark.parametrize("max_length", [None, 16])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "adds_bos"])
def test_strings_are_split_into_tokens_as_hflm_does(
    checkpoints, tokenizer, tmp_path, max_length, add_bos_token, adds_bos
):
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
    assert_equal_scores(hf, moa, PAIRS)
    assert recorded[moa] == [(pair, *truncated(Request(*ids), moa.max_length)) for pair, *ids in recorded[hf]]


def test_each_distinct_string_is_tokenized_once(both, monkeypatch):
    _, moa = both
    seen, lists = [], []
    call, encode = type(moa.tokenizer).__call__, type(moa.tokenizer).encode

    def count(self, text, *args, **kwargs):
        seen.extend([text] if isinstance(text, str) else text)
        lists.append(text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(moa.tokenizer), "__call__", count)
    monkeypatch.setattr(type(moa.tokenizer), "encode", lambda self, text, **kw: seen.append(text) or encode(self, text))
    pairs = [("A man is", " sitting"), ("A man is", " standing"), ("A man is ", "up"), ("", "alone"), ("", "alone")]
    moa.loglikelihood(requests_of(pairs), disable_tqdm=True)
    assert sorted(seen) == sorted(["A man is", "A man is sitting", "A man is standing", "A man is up", "alone"])
    assert len(lists) == 2  # one call with special tokens where the tokenizer adds them, one without


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_does_not_move_scores(both, batch_size, monkeypatch):
    hf, moa = both
    monkeypatch.setattr(moa, "batch_size_per_gpu", batch_size)
    assert_equal_scores(hf, moa, PAIRS)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["trees", "hf_code"])
def test_batch_sizes_found_by_hf(checkpoints, name):
    """`auto:N` is hf's search where its code scores, and our own choice otherwise."""
    hf, moa = (
        cls(str(checkpoints / name), device="cpu", max_length=32, batch_size="auto:2", max_batch_size=4)
        for cls in (HFLM, MoALM)
    )
    assert_equal_scores(hf, moa, PAIRS[:20])
    assert hf.batch_sizes
    assert moa.batch_sizes == (hf.batch_sizes if name == "bloom" else {})


def test_rolling_likelihood_and_generation_are_inherited(both, monkeypatch):
    texts = [("A man is sitting on a roof. " * count,) for count in (1, 2, 9)]
    for lm in both:
        monkeypatch.setattr(lm, "_max_length", 32)
    expected, got = (lm.loglikelihood_rolling(requests_of(texts), disable_tqdm=True) for lm in both)
    assert got == pytest.approx(expected, abs=1e-3)  # sums over up to 9 windows
    arguments = [("A man is", {"until": ["."], "max_gen_toks": 8}), ("The", {"until": [], "max_gen_toks": 8})]
    for lm in both:
        monkeypatch.setattr(lm, "_max_length", None)
        lm.loglikelihood(requests_of(PAIRS[20:22]), disable_tqdm=True)  # scoring leaves generation as it was
    expected, got = (lm.generate_until(requests_of(arguments, "generate_until"), disable_tqdm=True) for lm in both)
    assert got == expected


def instances(pairs, task="task"):
    """Requests as lm-eval's tasks make them, one a document."""
    arguments = {"request_type": "loglikelihood", "doc": {}, "idx": 0}
    return [Instance(**arguments, arguments=pair, metadata=(task, index, 1)) for index, pair in enumerate(pairs)]


LONG = " sitting" * 30
UNSCORED = (-math.inf, False)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["trees", "hf_code"])
def test_requests_that_hf_fails_at_do_not_end_the_evaluation(checkpoints, name, caplog):
    """Each is scored as hf scores the tokens that it stands for, or is out of the choice; the others as ever."""
    hf, moa = (cls(str(checkpoints / name), device="cpu", max_length=16) for cls in (HFLM, MoALM))
    a, the, start = (moa.tok_encode(text) for text in ("A", " the", "The"))
    assert [len(ids) for ids in (a, the, start)] == [1] * 3
    cut = moa.tok_encode(LONG)[-17:]
    prefix = [moa.prefix_token_id]
    irregular = {  # what is scored instead: context and continuation in tokens
        ("A t", "he"): (a, the),
        ("Th", "e"): (prefix, start),  # two tokens become one
        (" ", "A"): (prefix, moa.tok_encode(" A")),
        ("A", LONG): (cut[:1], cut[1:]),
        ("A", ""): None,
        ("", "<s>"): None,
    }
    for pair in irregular:
        with pytest.raises(AssertionError):
            hf.loglikelihood(requests_of([pair]), disable_tqdm=True)
    ordinary = [("A man", " is"), ("A man sits." * 9, " up")]
    got = moa.loglikelihood(instances([*ordinary, *irregular]), disable_tqdm=True)
    tokens = [(None, *ids) for ids in irregular.values() if ids]
    expected = hf.loglikelihood(requests_of(ordinary), disable_tqdm=True)
    expected += [*hf._loglikelihood_tokens(tokens, disable_tqdm=True), UNSCORED, UNSCORED]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-4), theirs[1])
    counts = {"merged": 2, "continuation_truncated": 1, "context_truncated": 1, "empty": 2}
    info = moa.get_model_info()
    assert (info["irregular_items"], info["truncation"]) == ({"task": counts}, "left")
    assert caplog.text.count("; items: task ") == len(counts)  # once a kind
    assert "BOS and beginning lost, as by hf; items: task 1 (first: task, doc_id 1)" in caplog.text


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["trees", "hf_code"])
def test_truncation(checkpoints, name):
    pairs = [("A man", " is"), ("A man sits. " * 9, " up"), ("A", LONG)]
    arguments = {"device": "cpu", "max_length": 16}
    moa = MoALM(str(checkpoints / name), truncation="skip", **arguments)
    left = MoALM(str(checkpoints / name), truncation=True, **arguments).loglikelihood(instances(pairs))
    assert moa.loglikelihood(instances(pairs)) == [pytest.approx(left[0], abs=1e-4), UNSCORED, UNSCORED]
    assert moa.loglikelihood(instances(pairs[1:])) == [UNSCORED] * 2
    assert moa.get_model_info()["irregular_items"] == {"task": {"skipped": 2}}
    moa = MoALM(str(checkpoints / name), truncation="error", **arguments)
    assert len(moa.loglikelihood(instances([pairs[0], ("A", "")]))) == 2
    with pytest.raises(ModelError, match=r"doc_id 1 of task has \d+ tokens of context and 2 of .*max_length=16"):
        moa.loglikelihood(instances(pairs))


def test_partial_results_reach_the_cache(both, monkeypatch):
    _, moa = both
    stored = {}

    class Hook:
        dbdict = None

        def add_partial(self, kind, strings, answer):
            stored[kind, strings] = answer

    monkeypatch.setattr(moa, "cache_hook", Hook())
    pairs = [("A man", " is"), ("A man", " was"), ("", "x")]
    got = moa.loglikelihood(requests_of(pairs), disable_tqdm=True)
    assert stored == {("loglikelihood", pair): answer for pair, answer in zip(pairs, got, strict=True)}


def test_transformers_does_not_warn_of_texts_that_are_cut(both, monkeypatch):
    _, moa = both
    monkeypatch.setattr(moa.tokenizer, "model_max_length", 16)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    moa.loglikelihood(requests_of([("A", LONG)]), disable_tqdm=True)
    logging.getLogger("transformers").removeHandler(handler)
    assert not records


@pytest.mark.filterwarnings("default")
def test_counts_survive_where_the_cache_has_every_answer(checkpoints, tmp_path):
    pairs = [("A man", " is"), ("A man sits. " * 9, " up"), ("A", LONG)]
    answers, counts = [], []
    for _ in range(2):
        moa = MoALM(str(checkpoints / "llama"), device="cpu", max_length=16)
        answers.append(CachingLM(moa, str(tmp_path / "answers.db")).loglikelihood(instances(pairs)))
        counts.append(moa.get_model_info()["irregular_items"])
    assert answers[0] == answers[1]
    assert counts == [{"task": {"context_truncated": 1, "continuation_truncated": 1}}] * 2


@pytest.mark.filterwarnings("default")
def test_other_models_are_scored_by_hflm(checkpoints, caplog):
    hf, moa = (cls(str(checkpoints / "bloom"), device="cpu", max_length=64) for cls in (HFLM, MoALM))
    for _ in range(2):
        assert_equal_scores(hf, moa, PAIRS[:20])
    warnings = [record.message for record in caplog.records if "HFLM's code" in record.message]
    assert len(warnings) == 1
    assert "position_ids" in warnings[0]


def test_a_model_object_is_taken(both, checkpoints, tokenizer):
    hf, _ = both
    moa = MoALM(LlamaForCausalLM.from_pretrained(checkpoints / "llama"), tokenizer=tokenizer)
    assert_equal_scores(hf, moa, PAIRS[:20])
    assert get_model("moa") is MoALM


def broken(kind, folder, llama):
    """Make `folder` a checkpoint with one fault."""
    if kind == "no folder":
        return
    if kind in ("vit", "t5"):
        {"vit": ViTConfig, "t5": T5Config}[kind]().save_pretrained(folder)
        return
    shutil.copytree(llama, folder)
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif kind == "unknown type":
        (folder / "config.json").write_text('{"model_type": "foo"}')
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    elif kind == "nan":
        model = LlamaForCausalLM.from_pretrained(folder)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        model.save_pretrained(folder)


FAULTS = {
    "no folder": ({}, "does not exist"),
    "no config": ({}, "holds no config.json: name a transformers checkpoint"),
    "adapter": ({}, "it is an adapter: pass pretrained=BASE,peft="),
    "unknown type": ({}, "cannot read the config of .*foo"),
    "vit": ({}, "of type 'vit', no causal language model"),
    "t5": ({}, "of type 't5', no causal language model"),
    "no tokenizer": ({}, "no tokenizer could be loaded from .*tokenizer=NAME_OR_DIR"),
    "bad tokenizer": ({}, "cannot load the tokenizer of "),
    "no weights": ({}, "cannot load the weights of .*model.safetensors"),
    "truncated": ({}, "model.safetensors is truncated or damaged"),
    "shapes": ({}, "do not have the shapes of its config.json"),
    "nan": ({}, "not finite: model.layers.1.mlp.up_proj.weight; training diverged"),
    "argument": ({"max_lenght": 7}, "unknown model argument 'max_lenght': did you mean 'max_length'"),
    "truncation": ({"truncation": "right"}, "truncation='right' is not available: choose left, skip, error"),
    "dtype": ({"dtype": "floaty"}, "cannot use dtype='floaty'"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_one_line(kind, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments, message = FAULTS[kind]
    folder = tmp_path / "checkpoint"
    broken(kind, folder, checkpoints / "llama")
    with pytest.raises(ValueError, match=message) as caught:
        MoALM(str(folder), device="cpu", **arguments)
    assert isinstance(caught.value, ModelError)
    assert isinstance(caught.value, SystemExit)  # what keeps a traceback away from lm-eval's command line
    assert caught.value.code == f"moa: {caught.value}"
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("place", ["pytorch_model.bin", "index", "adapter_model.bin", "subfolder"])
@pytest.mark.parametrize("name", ["moa", "llama"])
def test_nothing_is_unpickled(name, place, checkpoints, tmp_path, monkeypatch):
    """Whatever folder is given, and even where it is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    base, folder, arguments = checkpoints / name, tmp_path / "checkpoint", {}
    shutil.copytree(base, folder)
    pickled = folder / ("adapter_model.bin" if place == "adapter_model.bin" else "pytorch_model.bin")
    torch.save({"weight": Trap()}, pickled)
    if place == "adapter_model.bin":
        (folder / "config.json").rename(folder / "adapter_config.json")
        arguments = {"peft": str(folder)}
    else:
        (folder / "model.safetensors").unlink()
        base = folder
    if place == "index":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": pickled.name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if place == "subfolder":
        base, arguments = tmp_path, {"subfolder": folder.name, "tokenizer": str(checkpoints / name)}
    loaded = []
    with monkeypatch.context() as patched:
        for module, reader in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            patched.setattr(module, reader, lambda *_, **__: loaded.append(1))
        with pytest.raises(ModelError, match=f"{folder} has its weights in {pickled.name}.*convert it to safetensors"):
            MoALM(str(base), device="cpu", **arguments)
        assert not loaded
    if place == "pytorch_model.bin":
        (folder / "model.extra.safetensors").write_bytes(b"")  # then transformers itself must not fall back
        with pytest.raises(ModelError, match=f"cannot load the weights of {folder}.*no file named model.safetensors"):
            MoALM(str(folder), device="cpu", use_safetensors=False)
    assert not (tmp_path / "unpickled").exists()


def test_no_checkpoint_and_nan_scores(both, monkeypatch):
    with pytest.raises(ModelError, match="pass --model_args pretrained=DIR"):
        MoALM(device="cpu")
    _, moa = both
    moa.loglikelihood(requests_of(PAIRS[20:22]), disable_tqdm=True)
    monkeypatch.setattr(moa.model.model.norm.weight, "data", torch.full_like(moa.model.model.norm.weight, torch.nan))
    with pytest.raises(ModelError, match="NaN as a log-probability"):
        moa.loglikelihood(requests_of(PAIRS[20:22]), disable_tqdm=True)


# What each process runs: the command line, with the task index limited to what is evaluated (lm-eval reads thousands
# of files otherwise), a note of the strings that were scored, and a kill after some answers of one process.
PROCESS = """
import json, os, signal, sys, time
from pathlib import Path
from lm_eval.api.model import CacheHook
from lm_eval.tasks import TaskManager
import moa_eval.__main__, moa_eval.harness

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
    settings |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_DATASETS_CACHE": str(tmp_path / "cache")}

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


def assert_results_of_one_unbroken_run(checkpoints, out):
    """One result file, with the accuracies, answers and counts of a run in this process."""
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
@pytest.mark.filterwarnings("default")
def test_two_processes_share_the_work(checkpoints, tmp_path, run):
    """Under accelerate on one CPU machine: every request once, one result file, the numbers of one process."""
    done, notes = run(2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(note["rank"], note["world"]) for note in notes] == [(0, 2), (1, 2)]
    pairs = scored(notes)
    assert len(pairs) == len(set(pairs)) == TASKS["openbookqa"] + TASKS["winogrande"]
    assert_results_of_one_unbroken_run(checkpoints, tmp_path / "out")
    assert done.stdout.rstrip().splitlines()[-1].startswith("|winogrande")  # the table is the last of it
    for once in ("Selected tasks:", "Task: winogrande", "cut from the left"):
        assert done.stderr.count(once) == 1, once


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("processes", "killed"), [(1, "0"), (2, "1")])
def test_a_killed_evaluation_goes_on_where_it_was(checkpoints, tmp_path, run, processes, killed):
    """With `--use_cache`: what was answered is not scored again, and the results are those of an unbroken run."""
    cache = ("--use_cache", str(tmp_path / "answers"))
    done, notes = run(processes, *cache, killed=killed)
    assert done.returncode != 0
    assert not list((tmp_path / "out").rglob("results_*.json"))
    done, later = run(processes, *cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(scored(later)) <= len(scored(notes)) - 20
    assert_results_of_one_unbroken_run(checkpoints, tmp_path / "out")
