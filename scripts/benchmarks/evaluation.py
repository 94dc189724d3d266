"""Time of `--model moa` against `--model hf` on the four zero-shot tasks, with the scores checked to be equal.

    python scripts/benchmark.py eval --model DIR --hub FOLDER --limit 100 --batch-sizes 1,8,32,64

`--hub` is a folder with the four data sets laid out as on the hub (allenai/ai2_arc and so on). Both sides hold the
same weights in the same process; hf runs at each batch size, then its fastest and moa take turns. `--limit N` takes N
items a task, evenly over the split, so that lengths are distributed as in the whole; `total` weighs each task by the
requests of its full split.

`counted` is what perfect prefix sharing within an item allows, in floating-point operations of weights and visible
attention pairs: hf's, for the whole text of every request with logits at each position, over those of each distinct
prefix once with the logits that score something. hf's padding comes on top of it, so that more can be reached.
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TASKS = ("arc_challenge", "hellaswag", "openbookqa", "winogrande")
FEW_SHOT_TASKS = ("arc_challenge", "openbookqa")
ALLOWED_DIFFERENCE = 1e-3


class Row(NamedTuple):
    """One task: requests timed and in the full split, seconds, operations without and with sharing, peaks in MiB."""

    task: str
    shots: int
    requests: int
    full_requests: float
    hf_s: float
    hf_batch_size: int
    moa_s: float
    alone: float
    shared: float
    hf_mib: float
    moa_mib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--model", help="checkpoint folder; without it, random weights of --size")
    parser.add_argument("--size", default="dense-0.12b", help="a named size, with --ffn")
    parser.add_argument("--ffn", default="swiglu", help="FFN variant of the named size")
    parser.add_argument("--tokenizer", help="tokenizer folder if --model has none; else byte-level BPE of the items")
    parser.add_argument("--hub", default=str(ROOT / "tests/eval/items"), help="folder with the four data sets")
    parser.add_argument("--tasks", default=",".join(TASKS), help="zero-shot tasks")
    parser.add_argument("--limit", type=int, default=None, help="items a task, evenly over the split")
    parser.add_argument("--shots", type=int, default=5, help="examples of the extra rows; 0 leaves them out")
    parser.add_argument("--batch-sizes", default="1,8,32,64", help="batch sizes of hf; the fastest counts")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of the fastest hf and moa, in turn")
    parser.add_argument("--dtype", default="float32", help="data type of both")
    parser.add_argument("--device", default=None, help="default: cuda if there is one")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in eval mode on its device, and its tokenizer."""
    import torch
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
    """Byte-level BPE of the test items: right for smoke runs, its texts are longer than a real tokenizer's."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train([str(path) for path in sorted((ROOT / "tests/eval/items").rglob("*.jsonl"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def build_task(name: str, shots: int, limit: int | None) -> tuple[Any, float]:
    """A task of lm-eval with the requests of the items chosen, and the number of requests of its full split."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(Path(lm_eval.__file__).parent / "tasks" / part) for part in ("arc", *TASKS[1:])]
    task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    items = len(task.eval_docs)
    count = min(limit or items, items)
    chosen = [round(number * (items - 1) / max(count - 1, 1)) for number in range(count)]
    task.build_all_requests(samples=chosen)
    return task, len(task.instances) * items / count


def count(lm: Any, task: Any) -> tuple[float, float]:
    """Operations that hf needs without padding, and those with each distinct prefix of an item computed once."""
    config = lm.model.config
    head = lm.model.get_output_embeddings().weight
    outside = {id(weight): weight.numel() for weight in (lm.model.get_input_embeddings().weight, head)}
    body = sum(weight.numel() for weight in lm.model.parameters()) - sum(outside.values())
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)

    def operations(depths: Sequence[int], rows: int) -> int:
        pairs = 4 * width * config.num_hidden_layers * sum(depths)  # scores and weighted sum: two products each
        return 2 * body * len(depths) + pairs + 2 * head.numel() * rows

    texts: dict[int, set[tuple[int, ...]]] = defaultdict(set)  # hf, too, computes equal inputs once
    scored: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    tokens = lm._encode_pairs([instance.args for instance in task.instances], True)
    for instance, ((context, continuation), _) in zip(task.instances, tokens, strict=True):
        text = tuple([*context, *continuation][-(lm.max_length + 1) : -1])
        texts[instance.doc_id].add(text)
        scored[instance.doc_id] |= {text[: len(text) - back] for back in range(len(continuation))}
    alone = [depth for group in texts.values() for text in group for depth in range(1, len(text) + 1)]
    prefixes = [{text[:depth] for text in group for depth in range(1, len(text) + 1)} for group in texts.values()]
    shared = [len(prefix) for group in prefixes for prefix in group]
    return operations(alone, len(alone)), operations(shared, sum(map(len, scored.values())))


def measure(lm: Any, requests: list[Any]) -> tuple[float, float, list[tuple[float, bool]]]:
    """Seconds, peak memory in MiB (of the process on a CPU, of tensors on a GPU), and the scores."""
    import torch

    gc.collect()
    cuda = torch.device(lm.device).type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # the other side's freed memory is not ours
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    if cuda:
        return seconds, torch.cuda.max_memory_allocated() / 2**20, scores
    if sys.platform != "linux":
        return seconds, float("nan"), scores
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return seconds, int(peak.split()[1]) / 2**10, scores


def accuracies(task: Any, scores: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The task's own metrics, averaged over the items."""
    answers: dict[int, list[tuple[int, tuple[float, bool]]]] = defaultdict(list)
    docs = {}
    for instance, score in zip(task.instances, scores, strict=True):
        answers[instance.doc_id].append((instance.idx, score))
        docs[instance.doc_id] = instance.doc
    metrics = defaultdict(list)
    for item, given in answers.items():
        for name, value in task.process_results(docs[item], [score for _, score in sorted(given)]).items():
            metrics[name].append(float(value))
    return {name: statistics.fmean(values) for name, values in metrics.items()}


def compare(hf: Any, moa: Any, task: Any, shots: int, full: float, args: argparse.Namespace) -> Row:
    """Time both sides on a task, and check that they agree (in half precision hf rounds: differences are printed)."""
    requests = task.instances
    warm = requests[: max(1, len(requests) // 20)]
    moa.loglikelihood(warm, disable_tqdm=True)
    times: dict[int, list[float]] = {}
    peaks: dict[int, float] = {}
    theirs = []
    for batch_size in [int(part) for part in args.batch_sizes.split(",")]:
        hf.batch_size_per_gpu = batch_size
        hf.loglikelihood(warm, disable_tqdm=True)
        seconds, peaks[batch_size], theirs = measure(hf, requests)
        times[batch_size] = [seconds]
    hf.batch_size_per_gpu = best = min(times, key=lambda size: times[size][0])
    moa_times, moa_peak, ours = [], 0.0, []
    for number in range(args.rounds):
        seconds, moa_peak, ours = measure(moa, requests)
        moa_times.append(seconds)
        if number + 1 < args.rounds:
            times[best].append(measure(hf, requests)[0])
    difference = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    same = accuracies(task, ours) == accuracies(task, theirs)
    print(
        f"{task.config.task}, {shots}-shot: largest difference {difference:.1e}, accuracies equal: {same}", flush=True
    )
    if args.dtype == "float32" and (difference > ALLOWED_DIFFERENCE or not same):
        raise SystemExit(f"{task.config.task}: hf and moa disagree by {difference:.1e}")
    hf_s, moa_s = statistics.median(times[best]), statistics.median(moa_times)
    alone, shared = count(moa, task)
    return Row(task.config.task, shots, len(requests), full, hf_s, best, moa_s, alone, shared, peaks[best], moa_peak)


def report(rows: Sequence[Row]) -> str:
    """Markdown; the last row sums the zero-shot tasks, each weighted to its full split."""
    head = [
        "task",
        "shots",
        "requests",
        "hf batch",
        "hf s",
        "moa s",
        "ratio",
        "counted",
        "reached",
        "hf MiB",
        "moa MiB",
    ]
    cells = [head, ["---"] * len(head)]
    zero = [row for row in rows if row.shots == 0]
    weights = [row.full_requests / row.requests for row in zero]
    total = []
    if zero:
        seconds_and_work = ("hf_s", "moa_s", "alone", "shared", "full_requests")
        sums = {n: sum(getattr(r, n) * w for r, w in zip(zero, weights, strict=True)) for n in seconds_and_work}
        sums |= {name: max(getattr(row, name) for row in zero) for name in ("hf_mib", "moa_mib")}
        full = sum(row.full_requests for row in zero)
        total.append(zero[0]._replace(**sums | {"task": "total", "requests": round(full), "hf_batch_size": 0}))
    for row in (*rows, *total):
        ratio, counted = row.hf_s / row.moa_s, row.alone / row.shared
        line = [row.task, row.shots, row.requests, row.hf_batch_size or "", f"{row.hf_s:.2f}", f"{row.moa_s:.2f}"]
        line += [
            f"{ratio:.2f}",
            f"{counted:.2f}",
            f"{ratio / counted:.0%}",
            f"{row.hf_mib:.0f}",
            f"{row.moa_mib:.0f}",
        ]
        cells.append([str(cell) for cell in line])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def run(args: argparse.Namespace) -> None:
    """Run the tasks and print the table; see the module's docstring and `add_arguments`."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets.config
    import torch

    from moa_eval.harness import HFLM, MoALM

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(args)
    hf, moa = HFLM(model, tokenizer=tokenizer), MoALM(model, tokenizer=tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters()) / 1e9
    print(
        f"{args.model or args.size + ' ' + args.ffn}, {parameters:.3f} B parameters, {args.dtype}, {args.device}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    rows = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        os.chdir(args.hub)  # lm-eval's task files then find the data sets by their names
        try:
            jobs = [(name, 0) for name in args.tasks.split(",") if name]
            jobs += [(name, args.shots) for name in FEW_SHOT_TASKS if args.shots]
            for name, shots in jobs:
                task, full = build_task(name, shots, args.limit)
                rows.append(compare(hf, moa, task, shots, full, args))
        finally:
            os.chdir(here)
    rows.sort(key=lambda row: row.shots == 0)  # zero-shot rows stand right above their total
    print("\n" + report(rows))
