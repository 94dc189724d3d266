"""scripts/check_shards.py on token shards: every kind of damage is reported by file."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from moa_lm.token_shards import TokenSettings, make_tokens


@pytest.fixture
def packed(tmp_path, tokenizer_folder):
    """A set of 12 documents in 3 shards."""
    lines = [json.dumps({"text": " ".join(f"w{1 + (i * 7 + k) % 69}" for k in range(20))}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    options = TokenSettings(tokenizer=str(tokenizer_folder), shard_tokens=80)
    make_tokens([str(tmp_path / "texts.jsonl")], tmp_path / "set", options)
    return tmp_path / "set"


@pytest.fixture
def check(packed, script, capsys):
    """check() runs the command and returns its exit code and output."""
    return lambda: (script("check_shards")([str(packed), "--workers", "1"]), capsys.readouterr().out)


def test_intact_set(check):
    code, output = check()
    assert code == 0 and "3 shards, 252 tokens" in output


def test_wrong_tokens_with_a_matching_checksum(packed, check):
    tokens = np.copy(load_file(packed / "shard-000000.safetensors")["tokens"])
    tokens[5], tokens[-1] = 999, 3
    content = save({"tokens": tokens})
    (packed / "shard-000000.safetensors").write_bytes(content)
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (packed / "manifest.json").write_text(json.dumps(manifest))
    code, output = check()
    assert code == 1
    for problem in (
        "token 5 is 999, outside of the vocabulary of 70 (1 such tokens)",
        "has 3 ends of documents, the manifest lists 4 documents",
        "does not end with end-of-text",
    ):
        assert f"shard-000000.safetensors: {problem}" in output


def test_damaged_missing_and_unlisted_files(packed, check):
    (packed / "shard-000000.safetensors").write_bytes((packed / "shard-000000.safetensors").read_bytes()[:-2])
    (packed / "shard-000001.safetensors").unlink()
    (packed / "shard-000009.safetensors").write_bytes(b"")
    tokenizer = packed / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    code, output = check()
    assert code == 1
    for problem in (
        "shard-000000.safetensors: has ",
        "shard-000001.safetensors: [Errno 2] No such file",
        "shard-000009.safetensors: ",
        "tokenizer.json: SHA-256 differs from the manifest",
    ):
        assert problem in output, output
