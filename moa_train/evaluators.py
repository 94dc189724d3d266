"""Measurements of the model during training, at intervals of their own: accuracy of a probe, zero-shot tasks.

A script hands in factories by name, in the spirit of big_vision's evaluators: a factory takes the task and the
evaluator's settings, and returns a function that yields (name, value) pairs for a model. The config chooses:

    evaluators:
      knn: {interval: 500, train: SHARDS, val: SHARDS, k: 20}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from moa_train.config import RunConfig
from moa_train.errors import ConfigError, require
from moa_train.task import Task

Evaluate = Callable[[nn.Module], Iterable[tuple[str, float]]]
Factory = Callable[..., Evaluate]
"""(task, **settings) -> Evaluate. Raises ConfigError or DataError for settings that cannot be used."""


class Evaluator(NamedTuple):
    """An evaluator of a run.

    Attributes:
        name: Its key in the config.
        interval: Steps between two evaluations; the last step has one too.
        evaluate: The whole model, on its device in evaluation mode -> pairs of a name and a value.
    """

    name: str
    interval: int
    evaluate: Evaluate


def build_evaluators(config: RunConfig, task: Task, factories: Mapping[str, Factory]) -> list[Evaluator]:
    """Return the evaluators of a config.

    Raises:
        ConfigError: An evaluator or a setting is unknown, or has an invalid value.
        DataError: Data of an evaluator are missing.
    """
    evaluators = []
    for name, given in config.evaluators.items():
        key, known = f"evaluators.{name}", ", ".join(factories) or "none for this script"
        require(key, given, name in factories, f"an evaluator of {known}")
        settings: dict[str, Any] = dict(given)
        interval = settings.pop("interval", None)
        require(f"{key}.interval", interval, type(interval) is int and interval >= 1, "a number of steps, 1 or above")
        try:
            inspect.signature(factories[name]).bind(task, **settings)
        except TypeError as error:
            raise ConfigError(f"{key}: {error}") from error
        evaluators.append(Evaluator(name, interval, factories[name](task, **settings)))
    return evaluators
