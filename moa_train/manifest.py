"""Manifests of packed data sets: JSON with the size and SHA-256 of every file, read, written and verified."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_train.atomic_io import write_json
from moa_train.errors import DataError

MANIFEST = "manifest.json"

_MAX_COUNT = 2**63 - 1


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return the manifest entry of a finished file: its name, bytes and sha256, then `fields`."""
    return {"name": name or path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), **fields}


def file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """Return how a file differs from its manifest entry, or None if it does not. Raises OSError if it is unreadable."""
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes, the manifest lists {entry['bytes']}"
    return None if file_sha256(path) == entry["sha256"] else "SHA-256 differs from the manifest"


def write_manifest(folder: Path, format: str, shards: Sequence[dict[str, Any]], **fields: Any) -> None:
    """Write the manifest of a folder atomically, after its files: a data set without a manifest is unfinished.

    `format` has a version ("moa-images-2"), and `shards` are entries from `file_entry`.
    """
    write_json(folder / MANIFEST, {"format": format, **fields, "shards": list(shards)})


def read_manifest(folder: Path, format: str, counts: Sequence[str] = ()) -> dict[str, Any]:
    """Read and validate the manifest of a folder; see `parse_manifest`. Raises DataError."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), format, counts)
    except (OSError, DataError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise DataError(f"{path} cannot be read: {reason}; pack or copy the data set again") from error


def parse_manifest(content: bytes, format: str, counts: Sequence[str] = ()) -> dict[str, Any]:
    """Parse and validate a manifest. Raises DataError, naming the field.

    File names are plain: a manifest cannot name a file outside its folder. `counts` are fields such as "samples" that
    every shard has and whose sum the manifest has.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise DataError(f"format is {found!r}, expected {format!r}")
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        raise DataError("shards is not a list")
    for entry in shards:
        check_entry(entry, counts)
    names = [entry["name"] for entry in shards]
    if len(set(names)) < len(names):
        raise DataError(f"shard {max(names, key=names.count)} is listed twice")
    for field in counts:
        total = sum(entry[field] for entry in shards)
        if manifest.get(field) != total:
            raise DataError(f"{field} is {manifest.get(field)!r}, but its shards add up to {total}")
    return manifest


def check_entry(entry: Any, counts: Sequence[str] = ()) -> None:
    """Raise DataError unless `entry` has a plain file name, bytes, sha256 and these counts."""
    if not isinstance(entry, dict):
        raise DataError(f"the entry of a file is {entry!r}, expected an object")
    for field, pattern in (("name", r"\w[\w.-]*"), ("sha256", r"[0-9a-f]{64}")):
        if not isinstance(entry.get(field), str) or not re.fullmatch(pattern, entry[field]):
            raise DataError(f"{field} of a file is {entry.get(field)!r}, expected to match {pattern}")
    for field in ("bytes", *counts):
        if type(entry.get(field)) is not int or not 0 <= entry[field] <= _MAX_COUNT:
            raise DataError(f"{field} of {entry['name']} is {entry.get(field)!r}, expected a count")
