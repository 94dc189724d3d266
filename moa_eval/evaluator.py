"""Evaluator of language models in training: tasks of lm-eval by the tree scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moa_train.evaluators import Evaluate


def lm_eval_evaluator(
    task: Any, tasks: Sequence[str], limit: int | None = None, num_fewshot: int | None = None
) -> Evaluate:
    """Return an evaluator that yields ("TASK/METRIC", value) for the metrics of lm-eval's tasks.

    Args:
        task: The run, a `moa_lm.pretrain.LMTask`: its tokenizer scores the tasks.
        tasks: Names of tasks.
        limit: Items per task; None uses all.
        num_fewshot: Examples in the context; None takes the tasks' own number.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from moa_eval.harness.model import MoALM

    manager = TaskManager()

    def evaluate(model: nn.Module) -> Iterator[tuple[str, float]]:
        lm = MoALM(model, tokenizer=task.tokenizer)
        results = simple_evaluate(
            lm, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=0
        )
        for name, metrics in (results or {}).get("results", {}).items():
            for key, value in metrics.items():
                metric, _, chosen = key.partition(",")
                if chosen == "none" and not metric.endswith("_stderr") and isinstance(value, float):
                    yield f"{name}/{metric}", value

    return evaluate
