"""Checks of a data set of `moa_lm.token_shards`: checksums, tokens, documents and tokenizer."""

from __future__ import annotations

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
from moa_train.manifest import file_problem, file_sha256

_BLOCK_TOKENS = 2**24


def plan_check(folder: Path) -> Plan:
    """Plan the check of a data set; its manifest and its tokenizer are checked here."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return Plan(str(folder), "tokens", 0, [Problem(str(folder / MANIFEST), "", str(error))], [])
    shards = manifest["shards"]
    problems = unlisted(folder, [shard["name"] for shard in shards])
    if problem := tokenizer_problem(folder / TOKENIZER, manifest):
        problems.append(problem)
    checks = [partial(check_shard, folder, shard, manifest) for shard in shards]
    return Plan(str(folder), "tokens", sum(shard["bytes"] for shard in shards), problems, checks)


def check_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> Checked:
    """Check the bytes and tokens of one shard, and that it holds its documents, each ended by end-of-text."""
    path = folder / shard["name"]
    try:
        mismatch = file_problem(path, shard)
        texts = [mismatch] if mismatch else list(_token_problems(path, shard, manifest))
        problems = [Problem(str(path), "", text) for text in texts]
    except (OSError, SafetensorError, DataError) as error:
        problems = [Problem(str(path), "", str(error).removeprefix(f"{path} "))]
    return Checked(shard["tokens"], shard["bytes"], problems)


def _token_problems(path: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> Iterator[str]:
    documents, last = 0, -1
    vocab_size, end_of_text = manifest["vocab_size"], manifest["end_of_text"]
    for first, tokens in _blocks(path, manifest["dtype"], shard["tokens"]):
        outside = np.flatnonzero(tokens >= vocab_size)
        if len(outside):
            token, place = tokens[outside[0]], first + outside[0]
            yield f"token {place} is {token}, outside of the vocabulary of {vocab_size} ({len(outside)} such tokens)"
        documents += int((tokens == end_of_text).sum())
        last = int(tokens[-1])
    if documents != shard["documents"]:
        yield f"has {documents} ends of documents, the manifest lists {shard['documents']} documents"
    if last != end_of_text:
        yield "does not end with end-of-text"


def _blocks(path: Path, dtype: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the tokens of a shard in blocks, each with the index of its first token."""
    file, begin = open_tokens(path, dtype, count)
    with open(file, "rb") as content:  # noqa: PTH123  (a descriptor)
        content.seek(begin)
        for first in range(0, count, _BLOCK_TOKENS):
            yield first, np.fromfile(content, DTYPES[dtype], min(_BLOCK_TOKENS, count - first))


def tokenizer_problem(folder: Path, manifest: dict[str, Any]) -> Problem | None:
    """Return how a tokenizer differs from the one that the manifest's tokens were made with, or None."""
    path = folder / "tokenizer.json"
    try:
        if file_sha256(path) != manifest["tokenizer"]["sha256"]:
            return Problem(str(path), "", "SHA-256 differs from the manifest")
        vocabulary = open_vocabulary(folder, manifest["tokenizer"]["name"])
    except (OSError, DataError) as error:
        return Problem(str(path), "", f"cannot load the tokenizer: {error}")
    found, listed = (vocabulary.size, vocabulary.end_of_text), (manifest["vocab_size"], manifest["end_of_text"])
    if found != listed:
        return Problem(str(path), "", f"(vocab_size, end_of_text) is {found}, the manifest lists {listed}")
    return None
