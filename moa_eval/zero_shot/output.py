"""Output folders of lm-evaluation-harness, read and checked. The only place that knows their file names and keys.

`lm_eval ... --output_path DIR --log_samples` (0.4.3 and later) writes DIR/MODEL/results_DATE.json and, per task,
samples_TASK_DATE.jsonl; with a DIR that ends in .json it writes NAME_DATE.json and the samples beside it. Releases up
to 0.4.2 wrote results.json and MODEL_ARGS_TASK.jsonl (one JSON array). All of these are read.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moa_eval.training.reading import parse_json
from moa_train.errors import DataError

_DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
# In "<function doc_to_text at 0x7f...>", which the harness writes for a task's functions: another in every process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")
_RESULTS = re.compile(rf"(?!samples_).*_({_DATE})\.json")
_TOLERANCE = 1e-9  # of a mean that is recomputed from the samples; only rounding may differ
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count", "samples", "bypass")
# Metrics that the harness defines as the plain mean over items whatever the task's file says.
_MEANS = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})


class ResultsError(DataError):
    """Harness output is missing, incomplete or broken; the message is one line that names the file and the remedy."""


class Item(NamedTuple):
    """What was asked, as digests: two runs asked the same where all of these are equal.

    Attributes:
        doc_id: Position of the item in the task's split.
        doc, target, prompt: SHA-256 of the data set's row, of the right answer and of the (first) context.
        requests: SHA-256 of all contexts and continuations; empty where the samples lack them.
    """

    doc_id: int
    doc: str
    target: str
    prompt: str
    requests: str


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        name: Such as "acc_norm"; with the filter's name unless that is "none", such as "exact_match,strict-match".
        value, stderr: As the results file has them; the error is NaN where the harness gave none.
        scores: Value per item (N,), in the order of the task's items; None if the metric is not their mean.
    """

    name: str
    value: float
    stderr: float
    scores: NDArray[np.float64] | None


@dataclass(frozen=True)
class TaskResult:
    """One task as one model did it.

    Attributes:
        name: The harness's name, such as "arc_challenge".
        shots: Solved examples before each question; None if not recorded.
        version: The version of the task's file; None if not recorded.
        items: What was asked, in the order of doc_id.
        metrics: By `Metric.name`.
        config: The task's file as the harness resolved it.
        not_finite: Number of items with a log-likelihood that is not finite.
    """

    name: str
    shots: int | None
    version: str | None
    items: tuple[Item, ...]
    metrics: dict[str, Metric]
    config: dict[str, Any]
    not_finite: int


@dataclass(frozen=True)
class Evaluation:
    """What one run of the harness left behind.

    Attributes:
        given: The path it was read from, a file or folder.
        path: The results file.
        content: The results file's content.
        tasks: Every task by name, groups left out.
        notes: What a reader should know about the reading, one sentence each.
    """

    given: Path
    path: Path
    content: dict[str, Any]
    tasks: dict[str, TaskResult]
    notes: tuple[str, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The harness's own settings, with the model's arguments as a dictionary."""
        config = dict(self.content.get("config") or {})
        config["model_args"] = _arguments(config.get("model_args"))
        return config

    @property
    def model(self) -> str:
        """The model's name or path as given to the harness."""
        arguments = self.config["model_args"]
        named = (arguments.get(key) for key in ("peft", "delta", "pretrained", "model", "path"))
        return str(self.content.get("model_name") or next(filter(None, named), None) or self.path.parent.name)

    @property
    def limit(self) -> float | None:
        """The harness's `--limit`: items a task, or below 1 a part of them; None for all."""
        return self.config.get("limit")


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check one results file or output folder; of several results in one folder the newest is taken.

    Raises:
        ResultsError: A file is missing or broken, the samples are missing or do not give the results' accuracies, or
            a folder holds several models' results.
    """
    file, notes = _find(Path(path))
    content = _read_json(file)
    results = content.get("results")
    if not isinstance(results, dict) or not results:
        raise _broken(file, "has no results", "is it a results file of lm_eval?")
    for key in ("config", "configs", "versions", "n-shot", "n-samples"):
        if not isinstance(content.get(key) or {}, dict):
            raise _broken(file, f"has {key} that are no object", "the file is damaged: run lm_eval again")
    limit = (content.get("config") or {}).get("limit")
    if limit is not None and not _is_number(limit):
        raise _broken(file, f"has the limit {limit!r}", "the file is damaged: run lm_eval again")
    configs = content.get("configs") or {}
    tasks = {name: _read_task(file, content, name) for name in results if name in configs or not configs}
    if not tasks:
        raise _broken(file, "has results of groups only", "run lm_eval on the tasks themselves")
    return Evaluation(Path(path), file, content, tasks, tuple(notes))


def _broken(path: Path, reason: object, remedy: str) -> ResultsError:
    return ResultsError(f"{path}: {' '.join(str(reason).split())}; {remedy}")  # on one line, whatever a parser said


def _find(path: Path) -> tuple[Path, list[str]]:
    """The results file that a path stands for, and what to say about the choice."""
    if path.is_file():
        if path.name.startswith("samples_"):
            raise _broken(path, "holds samples", "give the results file beside it, or their folder")
        return path, []
    if not path.is_dir():
        raise _broken(path, "no such file or folder", "give what lm_eval --output_path wrote")
    dated = {file: match[1] for file in path.rglob("*.json") if (match := _RESULTS.fullmatch(file.name))}
    found = dated or dict.fromkeys(path.rglob("results.json"), "")  # before 0.4.3 there was no date
    if not found:
        raise _broken(path, "holds no results_*.json", "give what lm_eval --output_path wrote; has it finished?")
    if len(folders := sorted({str(file.parent) for file in found})) > 1:
        raise _broken(path, f"holds results of {len(folders)} folders ({', '.join(folders)})", "give one of them")
    newest = max(found, key=lambda file: (found[file], file.name))
    if len(found) == 1:
        return newest, []
    older = len(found) - 1
    return newest, [f"{path} holds {len(found)} results: {newest.name} is the newest; {older} older not used."]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, f"cannot be read ({error})", "restore the file or run lm_eval again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(_ADDRESS.sub("", _read_text(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ResultsError):
            raise
        raise _broken(path, f"not valid JSON ({error})", "the file is cut or damaged: run lm_eval again") from None
    if not isinstance(content, dict):
        raise _broken(path, f"holds a {type(content).__name__}, not an object", "is it a results file of lm_eval?")
    return content


def _read_task(file: Path, content: Mapping[str, Any], name: str) -> TaskResult:
    path = _samples_file(file, name)
    config = (content.get("configs") or {}).get(name) or {}
    if not isinstance(config, dict):
        raise _broken(file, f"has no settings of {name}", "the file is damaged: run lm_eval again")
    samples: dict[str, dict[int, dict[str, Any]]] = {}  # by filter, then by item
    for where, sample in _samples(path):
        identity = sample.get("doc_id") if isinstance(sample, dict) else None
        if not isinstance(identity, int) or isinstance(identity, bool):
            raise _broken(path, f"{where} has no whole number 'doc_id'", "is it a samples file of lm_eval?")
        by_item = samples.setdefault(str(sample.get("filter", "none")), {})
        if identity in by_item:
            raise _broken(path, f"doc_id {identity} occurs twice", "did two runs write this file? Run lm_eval again")
        by_item[identity] = sample
    if not samples:
        raise _broken(path, "holds no samples", "the file is cut: run lm_eval again")
    first = next(iter(samples.values()))
    for chosen, by_item in samples.items():
        if by_item.keys() != first.keys():
            raise _broken(path, f"filter {chosen} has other items", "the file is cut: run lm_eval again")
    counted = (content.get("n-samples") or {}).get(name) or {}
    expected = counted.get("effective") if isinstance(counted, dict) else None
    if isinstance(expected, int) and expected != len(first):
        reason = f"holds {len(first)} items, but {file.name} counts {expected}"
        raise _broken(path, reason, "the file is cut, or belongs to other results: run lm_eval again")
    order = sorted(first)
    shots, version = (content.get("n-shot") or {}).get(name), (content.get("versions") or {}).get(name)
    return TaskResult(
        name=name,
        shots=shots if isinstance(shots, int) else config.get("num_fewshot"),
        version=None if version is None else str(version),
        items=tuple(_item(identity, first[identity]) for identity in order),
        metrics=_metrics(path, name, content["results"][name], config, samples, order),
        config=config,
        not_finite=sum(not _finite(sample) for sample in first.values()),
    )


def _samples_file(file: Path, name: str) -> Path:
    """The samples of one task that were written together with a results file."""
    match = _RESULTS.fullmatch(file.name)
    if match:
        candidates = [file.with_name(f"samples_{name}_{match[1]}.{ending}") for ending in ("jsonl", "json")]
    else:  # the shortest name: "x_easy.jsonl" and "x_arc_easy.jsonl" both end in "_easy.jsonl"
        found = file.parent.glob(f"*_{_escape(name)}.jsonl")
        candidates = sorted(found, key=lambda path: (len(path.name), path.name))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = candidates[0].name if candidates else f"*_{name}.jsonl"
    remedy = "a paired comparison needs the answer to every item: run lm_eval with --log_samples"
    raise _broken(file, f"no samples of {name} beside it ({wanted})", remedy)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _samples(path: Path) -> Iterator[tuple[str, Any]]:
    """Every sample with the words for where it stands: JSON lines, or before 0.4.3 one array."""
    text = _read_text(path)
    remedy = "the file is cut or damaged: run lm_eval again"
    if text.lstrip().startswith("["):
        try:
            yield from ((f"entry {index}", sample) for index, sample in enumerate(parse_json(text)))
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"not valid JSON ({error})", remedy) from None
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: texts hold U+2028 and the like
        if line.strip():
            try:
                yield f"line {number}", parse_json(line)
            except (ValueError, RecursionError) as error:
                raise _broken(path, f"line {number} is not valid JSON ({error})", remedy) from None


def _item(identity: int, sample: Mapping[str, Any]) -> Item:
    requests = _requests(sample.get("arguments"))
    prompt = sample.get("prompt_hash") or (_sha(str(requests[0][0])) if requests and requests[0] else "")
    # As the harness computes it, so that releases with and without the hash agree.
    doc = sample.get("doc_hash") or _sha(json.dumps(sample.get("doc"), indent=2, ensure_ascii=False))
    listed = _sha(json.dumps(requests, ensure_ascii=False, sort_keys=True)) if requests else ""
    return Item(identity, str(doc), _sha(str(sample.get("target"))), str(prompt), listed)


def _requests(arguments: Any) -> list[list[Any]]:
    """All requests of an item as lists: {"gen_args_0": {"arg_0": ...}} since 0.4.3, plain lists before."""
    if isinstance(arguments, Mapping):
        arguments = [list(a.values()) if isinstance(a, Mapping) else [a] for a in arguments.values()]
    return [list(a) if isinstance(a, list) else [a] for a in arguments] if isinstance(arguments, list) else []


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _finite(sample: Mapping[str, Any]) -> bool:
    """Whether no log-likelihood of an item is NaN; the harness writes numbers as text."""
    answers = sample.get("filtered_resps")
    values = [a[0] for a in answers if isinstance(a, list) and len(a) == 2] if isinstance(answers, list) else []
    return not any(str(value).lower() in ("nan", "inf", "-inf") for value in values)


def _metrics(
    path: Path,
    task: str,
    results: Any,
    config: Mapping[str, Any],
    samples: Mapping[str, Mapping[int, Mapping[str, Any]]],
    order: list[int],
) -> dict[str, Metric]:
    found = {}
    for key, value in results.items() if isinstance(results, dict) else ():
        name, _, chosen = key.partition(",")
        if name.endswith("_stderr") or name in _NOT_METRICS or not _is_number(value):
            continue
        by_item = samples.get(chosen or "none") or (next(iter(samples.values())) if len(samples) == 1 else {})
        column = [sample.get(name) for sample in (by_item[i] for i in order)] if by_item else [None]
        scores = np.array(column, dtype=np.float64) if all(map(_is_number, column)) else None
        error = results.get(f"{name}_stderr,{chosen}" if chosen else f"{name}_stderr")
        if scores is None or not abs(scores.mean() - value) <= _TOLERANCE:  # a NaN is refused too
            if name in _MEANS or _aggregation(config, name) == "mean":
                shown = "is not in the samples" if scores is None else f"is {scores.mean():.6g} over the samples"
                remedy = "the samples are damaged or belong to other results: run lm_eval again"
                raise _broken(path, f"{task}: {name} {shown}, {value:.6g} in the results", remedy)
            scores = None
        label = name if chosen in ("", "none") else f"{name},{chosen}"
        found[label] = Metric(label, float(value), float(error) if _is_number(error) else math.nan, scores)
    if not found:
        raise _broken(path, f"{task}: the results have no metric", "run lm_eval without --predict_only")
    return found


def _aggregation(config: Mapping[str, Any], name: str) -> Any:
    listed = config.get("metric_list")
    entries = listed if isinstance(listed, list) else []
    return next((e.get("aggregation") for e in entries if isinstance(e, dict) and e.get("metric") == name), None)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, bool | int | float)


def _arguments(arguments: Any) -> dict[str, Any]:
    """The model's arguments as a dictionary, whether the harness kept a dictionary or a text "a=b,c=d"."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not isinstance(arguments, str):
        return {}
    return {key: value for key, _, value in (part.partition("=") for part in arguments.split(",") if part)}
