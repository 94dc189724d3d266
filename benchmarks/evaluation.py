"""Time of lm-eval's `--model moa` against `--model hf` on the four zero-shot tasks; their scores must be equal.

    python -m benchmarks eval --model DIR --hub FOLDER --limit 100 --batch-sizes 1,8,32,64

`--hub` is a folder with the four data sets laid out as on the hub (allenai/ai2_arc and so on). Both models share their
weights in one process. hf runs once at each batch size, then its fastest alternates with moa. `--limit N` takes N items
per task, evenly over the split, so that their lengths are distributed as in the whole split.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import positive
from benchmarks.tables import rate, report, speed_ratio, times
from benchmarks.timing import Case, measure, wall_seconds

ROOT = Path(__file__).parents[1]
TASKS = ("arc_challenge", "hellaswag", "openbookqa", "winogrande")
FEW_SHOT_TASKS = ("arc_challenge", "openbookqa")

ALLOWED_DIFFERENCE = 1e-3
"""Largest difference of two log-likelihoods in float32."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", help="checkpoint folder (default: random weights of --size)")
    parser.add_argument("--size", default="dense-0.12b", help="a named size, with --ffn (default: %(default)s)")
    parser.add_argument("--ffn", default="swiglu", help="FFN variant of the named size (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: --model's, or byte-level BPE of the items)")
    parser.add_argument("--hub", default=str(ROOT / "tests/eval/items"), help="folder with the four data sets")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="zero-shot tasks (default: all)")
    parser.add_argument("--limit", type=positive, help="items per task, evenly over the split")
    parser.add_argument("--shots", type=int, default=5, help="examples of the few-shot rows; 0 omits the rows")
    parser.add_argument("--batch-sizes", default="1,8,32,64", help="batch sizes of hf (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of both models (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets.config

    from moa_eval.harness import HFLM, MoALM

    model, tokenizer = load(args)
    hf, moa = HFLM(model, tokenizer=tokenizer), MoALM(model, tokenizer=tokenizer)
    out, cases = args.out.absolute(), []
    with tempfile.TemporaryDirectory() as cache, contextlib.chdir(args.hub):  # where lm-eval's tasks find their data
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        for name, shots in [(name, 0) for name in args.tasks] + [(n, args.shots) for n in FEW_SHOT_TASKS if args.shots]:
            cases += compare(hf, moa, build_task(name, shots, args.limit), shots, args)
    remark = f"{args.model or args.size + ' ' + args.ffn}, {args.dtype}"
    columns = [*times(), rate("requests"), *speed_ratio()]
    report("eval: --model moa against --model hf", cases, columns, args.device, out, remark)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moa_lm import MoALlamaForCausalLM, named_config

    dtype = getattr(torch, args.dtype)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        torch.manual_seed(0)
        model = MoALlamaForCausalLM(named_config(args.size, args.ffn)).to(dtype)
    source = args.tokenizer or args.model
    tokenizer = AutoTokenizer.from_pretrained(source) if source else train_tokenizer(model.config.vocab_size)
    return model.eval().to(args.device), tokenizer


def train_tokenizer(vocabulary: int) -> Any:
    """Return a byte-level BPE of the test items, for smoke runs; its texts are longer than a real tokenizer's."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train([str(path) for path in sorted((ROOT / "tests/eval/items").rglob("*.jsonl"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def build_task(name: str, shots: int, limit: int | None) -> Any:
    """Return a task of lm-eval with the requests of the chosen items."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(Path(lm_eval.__file__).parent / "tasks" / part) for part in ("arc", *TASKS[1:])]
    task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    items = len(task.eval_docs)
    count = min(limit or items, items)
    task.build_all_requests(samples=[round(number * (items - 1) / max(count - 1, 1)) for number in range(count)])
    return task


def compare(hf: Any, moa: Any, task: Any, shots: int, args: argparse.Namespace) -> list[Case]:
    """Measure hf at its fastest batch size and moa on a task, and check that their scores agree."""
    requests = task.instances
    scores: dict[str, Any] = {}

    def score(name: str) -> None:
        scores[name] = {"hf": hf, "moa": moa}[name].loglikelihood(requests, disable_tqdm=True)

    def seconds(batch_size: int) -> float:
        hf.batch_size_per_gpu = batch_size
        return wall_seconds(partial(score, "hf"), args.device)

    hf.batch_size_per_gpu = min(map(int, args.batch_sizes.split(",")), key=seconds)
    batches = {"hf": str(hf.batch_size_per_gpu), "moa": ""}
    labels = {"task": task.config.task, "shots": str(shots)}
    cases = [
        Case(labels | {"model": name, "batch": batch}, partial(score, name), items=len(requests))
        for name, batch in batches.items()
    ]
    cases[1].baseline = cases[0]
    measure(cases, args.device, args.rounds, memory=False)
    check_scores(scores["hf"], scores["moa"], labels["task"], args.dtype)
    return cases


def check_scores(hf: list[tuple[float, bool]], moa: list[tuple[float, bool]], task: str, dtype: str) -> None:
    """Print the largest difference of log-likelihoods; in float32, exit if it is large or a greedy flag differs."""
    difference = max(abs(ours[0] - theirs[0]) for ours, theirs in zip(moa, hf, strict=True))
    same = all(ours[1] == theirs[1] for ours, theirs in zip(moa, hf, strict=True))
    print(f"{task}: largest difference {difference:.1e}, greedy flags equal: {same}", flush=True)
    if dtype == "float32" and (difference > ALLOWED_DIFFERENCE or not same):
        raise SystemExit(f"{task}: hf and moa disagree by {difference:.1e}")
