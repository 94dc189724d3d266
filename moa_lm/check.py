"""Checks a data set of `moa_lm.token_shards` against its manifest: files, checksums, tokens, documents, tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from moa_lm.data import DTYPES, MANIFEST, TOKENIZER, open_tokens, read_manifest
from moa_lm.encode import open_vocabulary
from moa_train.checks import Checked, Plan, Problem, unlisted
from moa_train.errors import DataError

_BLOCK = 2**24  # tokens that are in memory at a time


def plan_check(folder: Path) -> Plan:
    """Plan the check of a data set; its manifest and its tokenizer are checked here."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return Plan(str(folder), "tokens", 0, [Problem(str(folder / MANIFEST), "", str(error))], [])
    shards = manifest["shards"]
    names = [shard["name"] for shard in shards]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    problems = [Problem(str(folder / MANIFEST), name, "is listed twice") for name in twice]
    problems += unlisted(folder, names)
    problems += tokenizer_problems(folder / TOKENIZER, manifest)
    checks = [partial(check_shard, folder, shard, manifest) for shard in shards]
    return Plan(str(folder), "tokens", sum(shard["bytes"] for shard in shards), problems, checks)


def check_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> Checked:
    """Check one shard: its bytes, its tokens, and that it holds its documents, each ended by end-of-text.

    Args:
        folder: of the set.
        shard: what the manifest says of it.
        manifest: of the set.
    """
    path = folder / shard["name"]
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        return Checked(0, shard["bytes"], [Problem(str(path), "", error.strerror or str(error))])
    problems = []
    if size != shard["bytes"]:
        problems.append(Problem(str(path), "", f"has {size} bytes, the manifest says {shard['bytes']}"))
    elif digest != shard["sha256"]:
        problems.append(Problem(str(path), "", "its SHA-256 is not the manifest's"))
    try:
        problems += _token_problems(path, shard, manifest)
    except (OSError, SafetensorError, DataError) as error:
        problems.append(Problem(str(path), "", str(error).removeprefix(f"{path} ")))
    return Checked(shard["tokens"], size, problems)


def _token_problems(path: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> list[Problem]:
    """What is wrong with the tokens of a shard that can be read."""
    problems = []
    documents, last = 0, -1
    vocab_size, end_of_text = manifest["vocab_size"], manifest["end_of_text"]
    for first, tokens in _blocks(path, manifest["dtype"], shard["tokens"]):
        outside = np.flatnonzero(tokens >= vocab_size)
        if len(outside):
            found = f"{tokens[outside[0]]} is none of the {vocab_size} of the vocabulary ({len(outside)} such)"
            problems.append(Problem(str(path), f"token {first + outside[0]}", found))
        documents += int((tokens == end_of_text).sum())
        last = int(tokens[-1])
    if documents != shard["documents"]:
        found = f"has {documents} ends of documents, the manifest says {shard['documents']} documents"
        problems.append(Problem(str(path), "", found))
    if last != end_of_text:
        problems.append(Problem(str(path), "", "does not end with the end of a document"))
    return problems


def _blocks(path: Path, dtype: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens of a shard, some at a time, each with the number of its first."""
    file, begin = open_tokens(path, dtype, count)
    with open(file, "rb", buffering=0) as content:  # noqa: PTH123  (a descriptor)
        content.seek(begin)
        for first in range(0, count, _BLOCK):
            tokens = np.empty(min(_BLOCK, count - first), DTYPES[dtype])
            if content.readinto(tokens.data) != tokens.nbytes:
                raise OSError("ends before its tokens do")
            yield first, tokens


def tokenizer_problems(folder: Path, manifest: dict[str, Any]) -> list[Problem]:
    """What is wrong with the tokenizer in a folder, against the manifest of the tokens that were made with it."""
    path = folder / "tokenizer.json"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != manifest["tokenizer"]["sha256"]:
            return [Problem(str(path), "", "its SHA-256 is not the manifest's")]
        vocabulary = open_vocabulary(folder, manifest["tokenizer"]["name"])
    except Exception as error:  # transformers and tokenizers raise many types
        return [Problem(str(path), "", f"no tokenizer can be made of it: {error}")]
    found, said = (vocabulary.size, vocabulary.end_of_text), (manifest["vocab_size"], manifest["end_of_text"])
    if found != said:
        return [Problem(str(path), "", f"(vocabulary, end of text) is {found}, the manifest says {said}")]
    return []
