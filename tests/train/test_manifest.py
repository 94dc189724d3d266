"""Manifests of packed data sets."""

from __future__ import annotations

import hashlib
import json

import pytest

from moa_train.errors import DataError
from moa_train.manifest import MANIFEST, file_entry, file_problem, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A data set of two files."""
    for name, content in (("a.tar", b"first"), ("b.tar", b"second one")):
        (tmp_path / name).write_bytes(content)
    entries = [file_entry(tmp_path / name, samples=samples) for name, samples in (("a.tar", 2), ("b.tar", 3))]
    write_manifest(tmp_path, "set-1", entries, samples=5)
    return tmp_path


def test_files_are_verified_by_size_and_sha256(folder):
    first, second = read_manifest(folder, "set-1", ("samples",))["shards"]
    assert first == {"name": "a.tar", "bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest(), "samples": 2}
    assert file_problem(folder / "a.tar", first) is None
    assert file_problem(folder / "a.tar", second) == "has 5 bytes, the manifest lists 10"
    (folder / "a.tar").write_bytes(b"FIRST")
    assert file_problem(folder / "a.tar", first) == "SHA-256 differs from the manifest"


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.update(format="set-2"), "format is 'set-2', expected 'set-1'"),
    (lambda m: m.update(samples=6), "samples is 6, but its shards add up to 5"),
    (lambda m: m["shards"].append(m["shards"][0]), "a.tar is listed twice"),
    (lambda m: m["shards"][0].update(name="../a.tar"), "name of a file is '../a.tar'"),
    (lambda m: m["shards"][0].update(bytes=-1), "bytes of a.tar is -1"),
    (lambda m: m["shards"][0].update(samples=True), "samples of a.tar is True"),
])  # fmt: skip
def test_invalid_manifests_name_file_and_field(folder, change, message):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{folder / MANIFEST} cannot be read: .*{message}"):
        read_manifest(folder, "set-1", ("samples",))


def test_missing_and_malformed_manifests(folder):
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_manifest(folder, "set-1")
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match="no such file; pack or copy the data set again"):
        read_manifest(folder, "set-1")
