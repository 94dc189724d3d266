"""Reading of JSON and YAML files, and comparison of nested configs by dotted key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moa_train.errors import DataError


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a UTF-8 file. Raises DataError, ending with `remedy`, for anything else."""
    return _read(path, json.loads, remedy)


def read_yaml(path: Path, remedy: str, *, empty: bool = False) -> dict[str, Any]:
    """Return the YAML mapping in a UTF-8 file; with `empty`, an empty file has no keys.

    Raises DataError, ending with `remedy`, for anything else.
    """

    def parse(text: str) -> Any:
        content = yaml.safe_load(text)
        json.dumps(content, default=str, skipkeys=True)  # raises ValueError for an alias of a node that contains it
        return {} if content is None and empty else content

    return _read(path, parse, remedy)


def _read(path: Path, parse: Callable[[str], Any], remedy: str) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read (it holds a {type(content).__name__}, not keys with values); {remedy}")
    return content


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"optim.lr": ...} for {"optim": {"lr": ...}}; an empty dict stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def differing_keys(
    old: dict[str, Any], new: dict[str, Any], *, mutable_keys: frozenset[str] = frozenset()
) -> list[str]:
    """Return "optim.lr: 0.001 -> 0.002" for every dotted key outside `mutable_keys` whose value differs."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in mutable_keys and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()
