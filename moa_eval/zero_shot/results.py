"""Reader of lm-eval output, and the only module that knows its file names and keys.

`lm_eval ... --output_path DIR --log_samples` (0.4.3 or later) writes DIR/MODEL/results_DATE.json and one
samples_TASK_DATE.jsonl per task. With an output path that ends in .json it writes NAME_DATE.json and the samples in the
same folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from moa_eval.training.files import bad_file, check

_DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
_RESULTS_FILE = re.compile(rf"(?!samples_).*_({_DATE})\.json")
_FUNCTION_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")
"""Memory address in "<function doc_to_text at 0x7f...>", as lm-eval prints a task's functions."""
_MEAN_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that lm-eval defines as the mean over items."""
_MEAN_TOLERANCE = 1e-9
_IDENTITY = {"doc_hash": "texts", "target_hash": "answers", "prompt_hash": "prompts", "requests": "requests"}
"""Columns of `TaskResult.items` that identify what was asked, with their names in messages."""
_OBJECTS = {"type": "object", "additionalProperties": {"type": "object"}}
_SCHEMA = {
    "type": "object",
    "required": ["results"],
    "properties": {
        "results": _OBJECTS | {"minProperties": 1},
        "configs": _OBJECTS,
        "config": {
            "type": "object",
            "properties": {"limit": {"type": ["number", "null"]}, "model_num_parameters": {"type": "number"}},
        },
        "versions": {"type": "object"},
        "n-shot": {"type": "object"},
        "n-samples": _OBJECTS,
        "date": {"type": "number", "minimum": 0, "maximum": 1e11},
        "total_evaluation_time_seconds": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
    },
}
_RERUN = "the file is truncated or damaged: run lm_eval again"


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        name: Such as "acc_norm"; with the filter unless that is "none", such as "exact_match,strict-match".
        value: As in the results file.
        stderr: As in the results file, else of the mean of `scores`; NaN if unknown.
        scores: Values per item (N,), in the order of `TaskResult.items`; None if `value` is not their mean.
    """

    name: str
    value: float
    stderr: float
    scores: NDArray[np.float64] | None


@dataclass(frozen=True)
class TaskResult:
    """Results of one model on one task.

    Attributes:
        name: lm-eval's name, such as "arc_challenge".
        shots: Number of few-shot examples; None if not recorded.
        version: Version of the task's config; None if not recorded.
        items: Digests of what was asked, by doc_id: of the document, the answer, the prompt and all requests.
        metrics: By `Metric.name`.
        config: The task's config as lm-eval resolved it.
    """

    name: str
    shots: int | None
    version: str | None
    items: pd.DataFrame
    metrics: dict[str, Metric]
    config: dict[str, Any]

    def difference(self, other: TaskResult, own_label: str, other_label: str) -> str | None:
        """Return the first reason why two results of one task are not comparable, or None."""
        if self.shots != other.shots:
            return f"{self.shots} shots in {own_label}, {other.shots} in {other_label}"
        if self.version != other.version:
            return f"task version {self.version} in {own_label}, {other.version} in {other_label}"
        if only := [
            f"items only in {label}: {len(missing)}, first doc_id {missing[0]}"
            for a, b, label in ((self, other, own_label), (other, self, other_label))
            if len(missing := a.items.index.difference(b.items.index))
        ]:
            return ", ".join(only)
        for column, name in _IDENTITY.items():
            changed = self.items.index[self.items[column].ne(other.items[column]).to_numpy()]
            if len(changed):
                return f"items with different {name}: {len(changed)}, first doc_id {changed[0]}"
        if self.metrics.keys() != other.metrics.keys():
            return f"metrics {', '.join(self.metrics)} in {own_label}, {', '.join(other.metrics)} in {other_label}"
        return None


@dataclass(frozen=True)
class Evaluation:
    """Results of one run of lm-eval.

    Attributes:
        given: Path it was read from, a file or folder.
        path: The results file.
        content: Content of the results file.
        tasks: All tasks by name, without groups.
        older: Number of older results files in the same folder, which were ignored.
    """

    given: Path
    path: Path
    content: dict[str, Any]
    tasks: dict[str, TaskResult]
    older: int = 0

    @cached_property
    def config(self) -> dict[str, Any]:
        """lm-eval's own settings, with the model arguments as a dictionary."""
        config = dict(self.content.get("config", {}))
        arguments = config.get("model_args")
        if isinstance(arguments, str):
            pairs = (part.partition("=") for part in arguments.split(","))
            arguments = {key: value for key, _, value in pairs}
        return config | {"model_args": arguments if isinstance(arguments, dict) else {}}

    @property
    def model(self) -> str:
        """Name or path of the model as given to lm-eval."""
        return str(self.content.get("model_name") or self.path.parent.name)

    @property
    def limit(self) -> float | None:
        """lm-eval's `--limit`: number of items per task, or a fraction below 1; None for all items."""
        return self.config.get("limit")


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check a results file or an output folder, of which the newest results are used.

    Raises:
        DataError: A file is missing or damaged, there are no samples, the samples disagree with the results, or a
            folder holds the results of several models.
    """
    file, older = _find(Path(path))
    content = _read_results(file)
    tasks = {name: _read_task(file, content, name) for name in content["results"] if name in content.get("configs", {})}
    if not tasks:
        raise bad_file(file, "there are no results of single tasks", "run lm_eval on tasks, not only on groups")
    return Evaluation(Path(path), file, content, tasks, older)


def _find(path: Path) -> tuple[Path, int]:
    """Return the results file that a path stands for, and the number of older ones in its folder."""
    if path.is_file():
        if path.name.startswith("samples_"):
            raise bad_file(path, "this is a samples file", "give the results file or their folder")
        return path, 0
    if not path.is_dir():
        raise bad_file(path, "no such file or folder", "give the output path of lm_eval")
    dates = {file: match[1] for file in path.rglob("*.json") if (match := _RESULTS_FILE.fullmatch(file.name))}
    if not dates:
        raise bad_file(path, "there is no results_*.json", "give the output path of a finished lm_eval run")
    if len(folders := sorted({str(file.parent) for file in dates})) > 1:
        raise bad_file(path, f"there are results in {len(folders)} folders ({', '.join(folders)})", "give one of them")
    return max(dates, key=lambda file: (dates[file], file.name)), len(dates) - 1


def _read_results(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_FUNCTION_ADDRESS.sub("", file.read_text(encoding="utf-8")))
        json.dumps(content, ensure_ascii=False).encode()  # raises for a lone surrogate, which no page can hold
    except (ValueError, RecursionError) as error:
        raise bad_file(file, f"not valid JSON ({error})", _RERUN) from error
    check(file, content, _SCHEMA, _RERUN)
    return content


def _read_task(file: Path, content: Mapping[str, Any], name: str) -> TaskResult:
    path = _samples_file(file, name)
    by_filter = _read_samples(path)
    first = next(iter(by_filter.values()))
    expected = content.get("n-samples", {}).get(name, {}).get("effective", len(first))
    if len(first) != expected:
        reason = f"{len(first)} items, but {file.name} counts {expected}"
        raise bad_file(path, reason, "the file is truncated or belongs to other results: run lm_eval again")
    config = content["configs"][name]
    shots, version = content.get("n-shot", {}).get(name), content.get("versions", {}).get(name)
    return TaskResult(
        name=name,
        shots=shots if isinstance(shots, int) else None,
        version=None if version is None else str(version),
        items=first.reindex(columns=list(_IDENTITY)).astype(str),
        metrics=_metrics(path, content["results"][name], by_filter),
        config=config,
    )


def _samples_file(file: Path, task: str) -> Path:
    """Return the samples of one task that were written together with a results file."""
    match = _RESULTS_FILE.fullmatch(file.name)
    path = file.with_name(f"samples_{task}_{match[1] if match else 'DATE'}.jsonl")
    if not path.is_file():
        remedy = "paired tests need the answer to every item: run lm_eval with --log_samples"
        raise bad_file(file, f"samples of {task} are missing ({path.name})", remedy)
    return path


def _read_samples(path: Path) -> dict[str, pd.DataFrame]:
    """Return the samples of a task by filter, each table by doc_id in increasing order."""
    # splitlines() would also split at U+2028 and similar characters, which occur inside texts
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    samples = []
    for number, line in enumerate(lines, start=1):
        sample = _parse_sample(path, number, line)
        requests = json.dumps(sample.pop("arguments", None), sort_keys=True)
        sample["requests"] = hashlib.sha256(requests.encode()).hexdigest()
        samples.append(sample | {"filter": str(sample.get("filter", "none"))})
    if not samples:
        raise bad_file(path, "there are no samples", _RERUN)
    by_filter = {
        str(name): table.set_index("doc_id").sort_index()
        for name, table in pd.DataFrame(samples).groupby("filter", sort=False)
    }
    first = next(iter(by_filter.values()))
    for name, table in by_filter.items():
        if table.index.has_duplicates:
            doc_id = table.index[table.index.duplicated()][0]
            raise bad_file(path, f"doc_id {doc_id} occurs twice", "two runs wrote this file: run lm_eval again")
        if not table.index.equals(first.index):
            raise bad_file(path, f"filter {name} has other items", _RERUN)
    return by_filter


def _parse_sample(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"line {number} is not valid JSON ({error})", _RERUN) from error
    if not isinstance(sample, dict) or type(sample.get("doc_id")) is not int:
        raise bad_file(path, f"line {number} has no integer doc_id", "give samples of lm_eval 0.4.3 or later")
    return sample


def _metrics(path: Path, results: Mapping[str, Any], by_filter: Mapping[str, pd.DataFrame]) -> dict[str, Metric]:
    found = {}
    for key, value in results.items():
        name, _, chosen = key.partition(",")
        if not chosen or not _is_number(value) or name.endswith("_stderr") or name == "bypass":
            continue
        column = by_filter[chosen].to_dict("list").get(name, [None]) if chosen in by_filter else [None]
        scores = np.array(column, dtype=np.float64) if all(map(_is_number, column)) else None
        if scores is None or not abs(scores.mean() - value) <= _MEAN_TOLERANCE:  # also false for NaN
            if name in _MEAN_METRICS:
                shown = "missing" if scores is None else f"{scores.mean():.6g}"
                reason = f"{key} is {shown} in the samples, {value:.6g} in the results"
                raise bad_file(path, reason, "the samples are damaged or belong to other results: run lm_eval again")
            scores = None
        stderr = results.get(f"{name}_stderr,{chosen}")
        if not _is_number(stderr):
            stderr = math.nan if scores is None or len(scores) < 2 else stats.sem(scores)
        label = name if chosen == "none" else key
        found[label] = Metric(label, float(value), float(stderr), scores)
    if not found:
        raise bad_file(path, "the results have no metric", "run lm_eval without --predict_only")
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)
