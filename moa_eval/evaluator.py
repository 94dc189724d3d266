"""Evaluator of language models in training: tasks of lm-eval by the tree scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from torch import nn

from moa_train.errors import require
from moa_train.evaluators import Evaluate


def lm_eval_evaluator(
    task: Any, tasks: Sequence[str], limit: int | None = None, num_fewshot: int | None = None
) -> Evaluate:
    """Return an evaluator that yields ("TASK/METRIC", value): the metrics of lm-eval's tasks, and `measures`.

    With several tasks, "average/METRIC" is the mean over tasks of a metric that all of them have.

    Args:
        task: The run, a `moa_lm.pretrain.LMTask`: its tokenizer scores the tasks.
        tasks: Names of tasks.
        limit: Items per task; None uses all.
        num_fewshot: Examples in the context; None takes the tasks' own number.

    Raises ConfigError for an unknown task.
    """
    from lm_eval.evaluator import simple_evaluate

    from moa_eval.harness.model import MoALM

    manager = _task_manager()
    for name in tasks:
        require("evaluators.lm_eval.tasks", name, bool(manager.match_tasks([name])), "tasks of lm-eval")

    def evaluate(model: nn.Module) -> Iterator[tuple[str, float]]:
        lm = MoALM(model, tokenizer=task.tokenizer)
        results = simple_evaluate(
            lm, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=0
        )
        found = _by_metric(results or {})
        for metric, by_task in found.items():
            yield from ((f"{name}/{metric}", value) for name, value in by_task.items())
            if len(tasks) > 1 and by_task.keys() == set(tasks):
                yield f"average/{metric}", fmean(by_task.values())

    return evaluate


@cache
def _task_manager() -> Any:
    """Return lm-eval's index of tasks, which takes seconds to read; a sweep checks many runs in one process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _by_metric(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return {metric: {task: value}} of lm-eval's results in memory."""
    from moa_eval.zero_shot.likelihoods import measures  # late: training without this evaluator needs no scipy

    found: dict[str, dict[str, float]] = {}
    for name, metrics in results.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if chosen == "none" and not metric.endswith("_stderr") and isinstance(value, float):
                found.setdefault(metric, {})[name] = value
    for name, samples in results.get("samples", {}).items():
        measured = [measures(sample | {"arguments": _as_written(sample["arguments"])}) for sample in samples]
        for metric in measured[0] if measured else ():
            if all(metric in own for own in measured):
                found.setdefault(metric, {})[name] = fmean(own[metric] for own in measured)
    return found


def _as_written(arguments: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Return the arguments of a sample as lm-eval writes them to its files."""
    return {
        f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(request)}
        for number, request in enumerate(arguments)
    }
