"""JSON and YAML of run folders, read and checked: whatever is wrong is one ValueError that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

LARGEST, DEEPEST = 100_000, 50
"""Nodes and levels that a YAML text may have; a configuration of ours has about a hundred, in three."""

_FAULTS = (OSError, ValueError, RecursionError)
# What PyYAML's constructors raise for a tag that does not fit its value, such as "!!bool x" or "!!timestamp x".
_YAML_FAULTS = (*_FAULTS, yaml.YAMLError, AttributeError, LookupError, TypeError, OverflowError)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file, UTF-8.
        remedy: What to do if it cannot be read; the end of the message.

    Raises:
        ValueError: it is missing, is no JSON, or holds something else than an object.
    """
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except _FAULTS as error:
        raise _unreadable(path, error, remedy) from error


def read_yaml(path: Path, remedy: str, *, empty: bool = False) -> dict[str, Any]:
    """Return the YAML mapping in a file; keys are text at every depth.

    Args:
        path: The file, UTF-8.
        remedy: What to do if it cannot be read; the end of the message.
        empty: Take an empty file for a mapping without keys.

    Raises:
        ValueError: it is missing, is no YAML, holds something else than a mapping, or `check_shape` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_shape(text)
        content = yaml.safe_load(text)
        return _mapping({} if content is None and empty else content)
    except _YAML_FAULTS as error:
        raise _unreadable(path, error, remedy) from error


def check_shape(text: str) -> None:
    """Refuse a YAML text that is nested more than `DEEPEST` levels, or comes to more than `LARGEST` nodes.

    Aliases count as what they stand for: a few lines can stand for a billion nodes, and whoever walks through them,
    or prints them, does not come back. On a deep text PyYAML's parser in C, which jsonargparse uses, takes the whole
    interpreter down. What is no YAML at all passes; who reads the text will say so.

    Raises:
        ValueError: it is.
    """
    nodes: list[float] = [0]  # of the document, and of the lists and mappings that are open
    anchors: list[str | None] = [None]
    known: dict[str | None, float] = {}
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                nodes.append(1)
                anchors.append(event.anchor)
                known[event.anchor] = math.inf  # below itself it has no end
            elif isinstance(event, yaml.CollectionEndEvent):
                nodes[-2] += nodes[-1]
                known[anchors.pop()] = nodes.pop()
            elif isinstance(event, yaml.ScalarEvent):
                known[event.anchor] = 1
                nodes[-1] += 1
            elif isinstance(event, yaml.AliasEvent):
                nodes[-1] += known.get(event.anchor, 0)
            if len(nodes) > DEEPEST + 1:
                raise _Shape(f"it is nested more than {DEEPEST} levels deep")
            if nodes[-1] > LARGEST:
                raise _Shape(f"it comes to more than {LARGEST:,} values, its aliases followed; write out what is meant")
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, _Shape):
            raise


class _Shape(ValueError):
    """What `check_shape` refuses, told from what the parser does."""


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not keys with values")
    _check_keys(content)
    return content


def _check_keys(content: Any) -> None:
    """Raise ValueError for a key that is no text (YAML has numbers, dates and null as keys), at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is a key, but no text")
            _check_keys(value)
    elif isinstance(content, list):
        for value in content:
            _check_keys(value)


def _unreadable(path: Path, error: Exception, remedy: str) -> ValueError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return ValueError(f"{path} cannot be read ({reason or repr(error)}); {remedy}")
