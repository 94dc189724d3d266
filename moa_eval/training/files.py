"""JSON files checked against a schema, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema

from moa_train import reading
from moa_train.errors import DataError

NUMBER = {"type": "number"}
REMEDY = "restore the file or leave this run out"


def fields(optional: tuple[str, ...] = (), **types: Any) -> dict[str, Any]:
    """Return the JSON schema of an object whose values have JSON types ("string"), or schemas of their own."""
    properties = {key: own if isinstance(own, dict) else {"type": own} for key, own in types.items()}
    return {"type": "object", "required": [key for key in types if key not in optional], "properties": properties}


def list_of(schema: dict[str, Any] | str) -> dict[str, Any]:
    """Return the JSON schema of a list."""
    return {"type": "array", "items": {"type": schema} if isinstance(schema, str) else schema}


def bad_file(path: Path, reason: object, remedy: str = REMEDY) -> DataError:
    """Return the error for an unusable file: its path, what is wrong and what to do, on one line."""
    return DataError(f"{path}: {' '.join(str(reason).split())}; {remedy}")


def read_json(path: Path, schema: dict[str, Any], remedy: str = REMEDY) -> dict[str, Any]:
    """Return the object in a JSON file. Raises DataError if it is missing, damaged or does not match the schema."""
    content = reading.read_json(path, remedy)
    check(path, content, schema, remedy)
    return content


def check(path: Path, content: Any, schema: dict[str, Any], remedy: str = REMEDY) -> None:
    """Raise DataError if the content of a file does not match a JSON schema."""
    try:
        jsonschema.validate(content, schema)
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "content"
        raise bad_file(path, f"{place} has the wrong format ({error.message[:200]})", remedy) from error
