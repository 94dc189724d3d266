"""Shards and manifest of one set of tokens, written so that a later run can resume after any finished shard."""

from __future__ import annotations

import math
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from moa_lm.data import COUNTS, FORMAT, TENSOR
from moa_lm.documents import Corpus, ReadState, Text
from moa_lm.encode import Vocabulary
from moa_train.atomic_io import write_bytes, write_json
from moa_train.config import differing_keys
from moa_train.errors import ConfigError, DataError
from moa_train.manifest import MANIFEST, check_entry, file_entry, file_problem, parse_manifest, write_manifest

UNFINISHED = "unfinished.json"
"""Name of the record of a set that is being written: settings and finished shards."""

_RECORD_COUNTS = (*COUNTS, "text_bytes", "until")


class Report(NamedTuple):
    """A finished data set.

    Attributes:
        folder: Folder of the set.
        documents: Number of documents.
        tokens: Number of tokens, end-of-text included.
        bytes: Bytes of the texts in UTF-8.
        shards: Number of shards.
        kept_shards: Number of shards kept from an earlier run.
        vocab_size: Number of the tokenizer's tokens.
        source: How far the source was read; train and val of one source share it.
    """

    folder: Path
    documents: int
    tokens: int
    bytes: int
    shards: int
    kept_shards: int
    vocab_size: int
    source: ReadState


def earlier_shards(folder: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of the shards that an earlier run wrote to a folder.

    Raises:
        ConfigError: It had other settings.
        DataError: Its manifest, finished or not, is damaged.
    """
    paths = [path for path in (folder / MANIFEST, folder / UNFINISHED) if path.exists()]
    if not paths:
        return []
    try:
        record = parse_manifest(paths[0].read_bytes(), FORMAT)
        for shard in record["shards"]:
            check_entry(shard, _RECORD_COUNTS)
        if not isinstance(record.get("settings"), dict):
            raise DataError("settings are missing")
    except DataError as error:
        raise DataError(f"{paths[0]} cannot be read: {error}; delete {folder} to start again") from error
    differing = differing_keys(record["settings"], identity, mutable_keys=frozenset())
    if differing and record["shards"]:
        raise ConfigError(
            f"{folder} was made with other settings ({', '.join(differing)}); use the same settings, delete the folder "
            "or choose another one"
        )
    return record["shards"]


class TokenSetWriter:
    """Packs the documents of one set into shards and keeps the intact shards of an earlier run.

    Attributes:
        end: Number of the document that reaches `max_tokens`; None until then.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        vocabulary: Vocabulary,
        earlier: list[dict[str, Any]],
        max_tokens: int | None,
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.vocabulary = vocabulary
        self.records = list(takewhile(self._is_intact, earlier))
        self.finished = bool(earlier) and self.records == earlier and (folder / MANIFEST).exists()
        self.kept = len(self.records)
        self.covered: int = self.records[-1]["until"] if self.records else 0
        self.end: int | None = None
        self._kept_ends = {record["until"]: record for record in self.records}
        self._tokens_left = math.inf if max_tokens is None else max_tokens
        self._count(self._sum("tokens"), self.covered)
        self._pieces: list[np.ndarray] = []
        self._tokens = self._bytes = 0
        self._last = ReadState()
        if not self.finished:
            self._save_progress()
            (folder / MANIFEST).unlink(missing_ok=True)

    def holds(self, text: Text, corpus: Corpus) -> bool:
        """Return whether a kept shard holds this document. Raises DataError if the texts up to it have changed."""
        end = self._kept_ends.pop(text.state.documents, None)
        if end is not None and end["until_sha256"] != text.state.sha256:
            raise corpus.changed(str(self.folder / end["name"]))
        return text.state.documents <= self.covered

    def add(self, text: Text, tokens: np.ndarray, corpus: Corpus) -> None:
        """Add a document to the current shard and write a full shard. Raises DataError for a finished set."""
        if self.finished:
            raise corpus.changed(str(self.folder))
        self._count(len(tokens), text.state.documents)
        self._pieces.append(tokens)
        self._tokens += len(tokens)
        self._bytes += text.bytes
        self._last = text.state
        if self._tokens >= self.identity["shard_tokens"]:
            self._write()

    def close(self, corpus: Corpus, end: ReadState) -> None:
        """Write the last shard. Raises DataError if the set is empty or lacks documents of the kept shards."""
        if self._kept_ends:
            raise corpus.changed(str(self.folder))
        if self._pieces:
            self._write()
        if not self.records:
            raise _empty(self.folder, corpus, end)

    def publish(self, corpus: Corpus, end: ReadState) -> Report:
        """Write the manifest, which makes the set valid, after `close`."""
        if not self.finished:
            names = {record["name"] for record in self.records}
            for path in self.folder.glob("shard-*.safetensors"):
                if path.name not in names:
                    path.unlink()
            source = {"names": list(corpus.names), **end._asdict()}
            write_manifest(self.folder, FORMAT, self.records, **self._totals(), source=source, settings=self.identity)
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        documents, tokens, size = (self._sum(field) for field in ("documents", "tokens", "text_bytes"))
        shards, vocab_size = len(self.records), self.vocabulary.size
        return Report(self.folder, documents, tokens, size, shards, self.kept, vocab_size, end)

    def _totals(self) -> dict[str, Any]:
        return {
            "tokens": self._sum("tokens"),
            "documents": self._sum("documents"),
            "bytes": self._sum("text_bytes"),
            "vocab_size": self.vocabulary.size,
            "end_of_text": self.vocabulary.end_of_text,
            "dtype": self.vocabulary.dtype,
            "tokenizer": {"name": self.vocabulary.name, "sha256": self.vocabulary.sha256},
        }

    def _sum(self, field: str) -> int:
        return sum(record[field] for record in self.records)

    def _count(self, tokens: int, document: int) -> None:
        self._tokens_left -= tokens
        if self._tokens_left <= 0:
            self.end = document

    def _write(self) -> None:
        """Write the current shard and record it."""
        path = self.folder / f"shard-{len(self.records):06d}.safetensors"
        write_bytes(path, save({TENSOR: np.concatenate(self._pieces)}))
        fields = {"tokens": self._tokens, "documents": len(self._pieces), "text_bytes": self._bytes}
        last = {"until": self._last.documents, "until_sha256": self._last.sha256}
        self.records.append(file_entry(path, **fields, **last))
        self._save_progress()
        self._pieces, self._tokens, self._bytes = [], 0, 0

    def _save_progress(self) -> None:
        progress = {"format": FORMAT, "settings": self.identity}
        write_json(self.folder / UNFINISHED, {**progress, "shards": self.records})

    def _is_intact(self, record: dict[str, Any]) -> bool:
        path = self.folder / record["name"]
        return path.exists() and file_problem(path, record) is None


def _empty(folder: Path, corpus: Corpus, end: ReadState) -> DataError:
    names = ", ".join(corpus.names)
    if not end.documents:
        return DataError(f"{names}: no usable document ({end.empty} empty, {end.unreadable} unreadable)")
    return DataError(
        f"none of the {end.documents} documents of {names} is left for {folder}; change val_fraction "
        f"({corpus.val_fraction}), split the texts into more documents (--split-on), or use --val-source"
    )
