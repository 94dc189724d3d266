"""Names of methods and runs on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moa_eval.page import formatting
from moa_eval.page.formatting import show
from moa_eval.training.configuration import (
    ABSENT,
    BUDGETS,
    WITHIN_METHOD,
    canonical,
    config_difference,
    role,
    size_part,
)
from moa_eval.training.runs import Run

FFN_NAMES = {
    "relu2": "ReLU²", "gelu": "GELU", "la": "LA", "moa": "MoA", "swiglu": "SwiGLU", "onela": "one-LA",
    "bila": "bi-LA", "qdla": "qd-LA", "onemoa": "one-MoA", "bimoa": "bi-MoA", "qdmoa": "qd-MoA",
}  # fmt: skip
_MOST_SETTINGS = 3  # shown in a label; beyond that, the run's name or the number of the size stands for them


class MethodNames(NamedTuple):
    """A method's label, the label without the size, and the size (empty if all methods have the same size)."""

    label: str
    name: str
    size: str


def method_names(run: Run, firsts: Sequence[Run]) -> MethodNames:
    """Return the names of the method of a run: its FFN, its size, and the settings that distinguish it.

    `firsts` are the first runs of all methods.
    """
    size_values = size_part(run.config)
    rivals = [other.config for other in firsts if other.ffn == run.ffn and size_part(other.config) == size_values]
    keys = [
        key
        for key, values in config_difference(rivals).items()
        if role(key, values) not in WITHIN_METHOD and key in run.settings and key not in BUDGETS
    ]
    settings = [_setting(key, run.settings[key]) for key in keys] if len(keys) <= _MOST_SETTINGS else [run.name]
    ffn, size = FFN_NAMES.get(run.ffn, run.ffn), _size(run, firsts)
    sized = [size] if size and "model.size" not in keys else []
    return MethodNames(", ".join([ffn, *sized, *settings]), ", ".join([ffn, *settings]), size)


def group_label(method: str, rate: float, is_tuned: bool) -> str:
    """Return the label of a run group; the learning rate appears if several were tried."""
    return f"{method}, lr {formatting.rate(rate)}" if is_tuned else method


def run_labels(groups: Sequence[tuple[str, Sequence[Run]]]) -> list[str]:
    """Return a unique label per run: its group's label, the seed, and if need be its name or folder."""
    runs = [run for _, own in groups for run in own]
    labels = [label if len(own) == 1 else f"{label}, seed {run.seed}" for label, own in groups for run in own]
    for suffixes in ([run.name for run in runs], [str(run.folder) for run in runs]):
        pairs = zip(labels, suffixes, strict=True)
        labels = [f"{label}, {suffix}" if labels.count(label) > 1 else label for label, suffix in pairs]
    return labels


def _setting(key: str, value: Any) -> str:
    name = key.split(".")[-1].removeprefix("ffn_")
    return show(value) if name in ("size", "encoder") else f"{name} {show(value)}"


def _size(run: Run, firsts: Sequence[Run]) -> str:
    parts = [size_part(other.config) for other in firsts]
    own = size_part(run.config)
    keys = [
        key
        for key in dict.fromkeys(key for part in parts for key in part)
        if len({canonical(part.get(key, ABSENT)) for part in parts}) > 1
    ]
    if len(keys) <= _MOST_SETTINGS:
        return ", ".join(_setting(key, own[key]) for key in keys if key in own)
    return f"size {[*dict.fromkeys(map(canonical, parts))].index(canonical(own)) + 1}"
