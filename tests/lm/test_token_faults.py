"""Malformed token shards, manifests and texts: every reader ends in our error or a result; check_shards tells all."""

import errno
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from moa_lm.data import TokenShards
from moa_lm.documents import Corpus
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.errors import DataError
from moa_train.open_files import open_to_read

FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def packed(tmp_path, tokenizer_folder):
    """A real set of 12 documents in 3 shards or so."""
    lines = [json.dumps({"text": " ".join(f"w{1 + (i * 7 + k) % 69}" for k in range(20))}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    options = TokenSettings(tokenizer=str(tokenizer_folder), shard_tokens=80)
    make_tokens([str(tmp_path / "texts.jsonl")], tmp_path / "set", options)
    return tmp_path / "set"


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).parents[2] / "scripts" / "check_shards.py"
    spec = importlib.util.spec_from_file_location("check_shards_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def relist(packed, number, content, **fields):
    """Replaces a shard and tells the manifest its bytes."""
    manifest = json.loads((packed / "manifest.json").read_text())
    shard = manifest["shards"][number]
    (packed / shard["name"]).write_bytes(content)
    shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **fields}
    (packed / "manifest.json").write_text(json.dumps(manifest))


def tokens_of(packed, number):
    shards = TokenShards(packed)
    tokens = np.empty(shards.manifest["shards"][number]["tokens"], np.uint16)
    shards.read_into(tokens, number, 0)
    return tokens


def test_check_shards(packed, command, capsys):
    assert command([str(packed), "--workers", "1"]) == 0
    assert "3 shards, 252 tokens" in capsys.readouterr().out
    wrong = tokens_of(packed, 0)
    wrong[5], wrong[-1] = 999, 3
    relist(packed, 0, save({"tokens": wrong}))
    (packed / "shard-000001.safetensors").unlink()
    third = packed / "shard-000002.safetensors"
    third.write_bytes(third.read_bytes()[:-2])
    tokenizer = packed / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    (packed / "shard-000009.safetensors").write_bytes(b"")
    assert command([str(packed), "--workers", "1"]) == 1
    told = capsys.readouterr().out
    for line in (
        "shard-000000.safetensors: token 5: 999 is none of the 70 of the vocabulary (1 such)",
        "shard-000000.safetensors: has 3 ends of documents, the manifest says 4 documents",
        "shard-000000.safetensors: does not end with the end of a document",
        "shard-000001.safetensors: No such file",
        "shard-000002.safetensors: has ",
        "tokenizer.json: its SHA-256 is not the manifest's",
        "shard-000009.safetensors: its manifest does not list it",
    ):
        assert line in told, told


def test_a_token_beyond_the_vocabulary_is_named(packed):
    wrong = tokens_of(packed, 0)
    wrong[5] = 999
    relist(packed, 0, save({"tokens": wrong}))
    with pytest.raises(DataError, match=r"window 0 of 8 tokens holds 999, but the vocabulary of .* has 70"):
        TokenShards(packed).window(0, 8)


def test_a_shard_that_shrinks_while_it_is_open_is_named(packed):
    """Mapped into memory it would end the process."""
    shards = TokenShards(packed)
    shards.window(0, 8)
    (packed / "shard-000000.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="has become shorter"):
        shards.window(1, 8)


def test_a_shard_that_fails_for_once_is_opened_again(packed, monkeypatch):
    """As on a network file system whose server came back: the descriptor stays stale, a new one is not."""
    monkeypatch.setattr("moa_train.open_files.RETRY_S", 0.0)
    shards = TokenShards(packed)
    first = shards.window(0, 8)
    stale, preadv = set(range(1000)), os.preadv

    def read(file, *rest):
        if file in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(file, *rest)

    def opened(path):
        file = open_to_read(path)
        stale.discard(file)
        return file

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr("moa_lm.data.open_to_read", opened)
    assert np.array_equal(shards.window(0, 8), first)
    monkeypatch.setattr("moa_lm.data.open_to_read", open_to_read)
    stale |= set(range(1000))
    with pytest.raises(DataError, match=r"shard-000000.* Stale file handle; run the"):
        shards.window(0, 8)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**400]) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_all(folder):
    try:
        shards = TokenShards(folder)
        for window in range(min(50, shards.windows(8))):
            assert len(shards.window(window, 8)) == 9
    except DataError as error:
        assert str(folder) in str(error)


def test_manifests(packed):
    path = packed / "manifest.json"
    good = path.read_text()
    whole = json.loads(good)
    fields = [(key,) for key in whole] + [("shards", 0, key) for key in whole["shards"][0]]
    fields += [("tokenizer", key) for key in whole["tokenizer"]]

    @settings(max_examples=200, **FUZZ)
    @given(st.sampled_from(fields), VALUES)
    def check(field, value):
        manifest = json.loads(good)
        place = manifest
        for key in field[:-1]:
            place = place[key]
        place[field[-1]] = value
        path.write_text(json.dumps(manifest))
        read_all(packed)

    check()
    path.write_text("[" * 10**6)
    read_all(packed)


def test_shards(packed):
    good = (packed / "shard-000000.safetensors").read_bytes()

    @settings(max_examples=150, **FUZZ)
    @given(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5)
    )
    def check(edits):
        data = bytearray(good)
        for at, new in edits:
            data[at : at + len(new)] = new
        relist(packed, 0, bytes(data[: len(good)]))
        read_all(packed)

    check()


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_texts(tmp_path, name):
    @settings(max_examples=80, **FUZZ)
    @given(
        st.sampled_from([b"", b'{"text": "a"}\n', b"\x1f\x8b\x08\0", b"PAR1", b"[" * 10**5]), st.binary(max_size=200)
    )
    def check(head, data):
        (tmp_path / name).write_bytes(head + data)
        try:
            for document in Corpus([str(tmp_path / name)]):
                assert document.where
        except ValueError as error:
            assert str(tmp_path / name) in str(error)

    check()
