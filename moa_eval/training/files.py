"""Readers of the JSON files of a run folder, with a check of their types."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

from moa_train.errors import DataError

NUMBER = int | float
REMEDY = "restore the file or leave this run out"


def bad_file(path: Path, reason: object, remedy: str = REMEDY) -> DataError:
    """Return the error for an unusable file: its path, what is wrong and what to do, on one line."""
    return DataError(" ".join(f"{path}: {reason}; {remedy}".splitlines()))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        DataError: The file is missing or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise bad_file(path, "missing", f"is {path.parent} a run folder, and has its training started?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise bad_file(path, f"cannot be read ({error})") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; integers beyond 64 bits become floats.

    Raises:
        ValueError: The text is not valid JSON.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, schema: dict[str, Any], remedy: str = REMEDY) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        schema: Required types, see `check`.
        remedy: What to do about an unusable file; the end of the message.

    Raises:
        DataError: The file is missing or unreadable, or does not match the schema.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise bad_file(path, f"not valid JSON ({error})", remedy) from error
    if fault := check(content, schema):
        raise bad_file(path, fault, remedy)
    return content


def check(value: Any, schema: Any, where: str = "") -> str | None:
    """Return the first mismatch between a JSON value and a schema, None if there is none.

    Args:
        value: The parsed value.
        schema: A type or union of types, `[schema]` for a list, or `{key: schema}` for an object; the keys of an
            object are required unless they end in "?".
        where: Dotted path of the value, for the message.
    """
    wanted: Any = type(schema) if isinstance(schema, dict | list) else schema
    if not _fits(value, wanted):
        return f"{where or 'the content'} is {value!r:.60}, expected {_name(wanted)}"
    if isinstance(schema, list):
        faults = (check(item, schema[0], f"{where}[{index}]") for index, item in enumerate(value))
    elif isinstance(schema, dict):
        faults = (_check_key(value, key, own, where) for key, own in schema.items())
    else:
        return None
    return next((fault for fault in faults if fault), None)


def _fits(value: Any, wanted: Any) -> bool:
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))  # a bool is an int in Python


def _check_key(value: Any, key: str, schema: Any, where: str) -> str | None:
    name = key.removesuffix("?")
    if name in value:
        return check(value[name], schema, f"{where}.{name}" if where else name)
    return f"{where or 'the content'} has no {name!r}" if name == key else None


def _name(wanted: Any) -> str:
    types = getattr(wanted, "__args__", (wanted,))
    names = {int: "number", float: "number", str: "text", bool: "boolean", dict: "object", NoneType: "null"}
    return " or ".join(dict.fromkeys(names.get(own, str(own)) for own in types))
