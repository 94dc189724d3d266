"""Documents of text, JSONL and Parquet files and of Hugging Face data sets, read in a fixed order."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

from moa_train.errors import ConfigError, DataError
from moa_train.progress import CountBar

_logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One document of a source.

    Attributes:
        where: FILE:LINE, FILE:row N or hf:NAME:row N, counted from 1.
        text: The text; "" where there is a problem.
        problem: Why the document is unreadable; "" where it is readable.
    """

    where: str
    text: str = ""
    problem: str = ""


Reader = Callable[[], Iterator[Document]]


class ReadState(NamedTuple):
    """How far a corpus has been read.

    Attributes:
        documents: Usable documents.
        sha256: SHA-256 over the SHA-256 digests of their texts.
        empty: Skipped documents without text.
        unreadable: Skipped documents with a problem.
    """

    documents: int = 0
    sha256: str = ""
    empty: int = 0
    unreadable: int = 0


class Text(NamedTuple):
    """A usable document.

    Attributes:
        text: The text.
        bytes: Its length in UTF-8.
        held_out: Whether it belongs to the held-out set, where one is split off.
        state: How far the corpus has been read, this document included.
    """

    text: str
    bytes: int
    held_out: bool
    state: ReadState


class Corpus:
    """The usable documents of several sources, in order, counted and hashed; can be iterated repeatedly.

    Args:
        sources: Text, JSONL or Parquet files (.txt, .jsonl, .parquet; the first two also .gz), folders of such files,
            globs, or hf:NAME[:OPTION=VALUE]..., a data set on the Hub or in a folder that `datasets` streams, with the
            options config, split (default: train), revision, data_dir and data_files.
        field: Text field of a record.
        split_on: Regular expression; a matching line of a text file begins a new document. None: a text file is one
            document.
        val_fraction: Fraction of the documents that is held out, chosen by a hash of the text.
        max_bad: Number of unreadable documents above which reading fails.

    Attributes:
        names: The sources.
        state: How far the latest iteration has read.

    Raises:
        ConfigError: The regular expression or an option of a source is invalid.
        DataError: A source does not exist or holds no such file.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        field: str = "text",
        split_on: str | None = None,
        val_fraction: float = 0.0,
        max_bad: int = 100,
    ) -> None:
        try:
            pattern = None if split_on is None else re.compile(split_on)
        except re.error as error:
            raise ConfigError(f"split_on is {split_on!r}; it must be a regular expression ({error})") from error
        self.names = tuple(sources)
        self.val_fraction = val_fraction
        self.max_bad = max_bad
        self.state = ReadState()
        self._readers = [reader for name in sources for reader in _readers(name, field, pattern)]

    def documents(self) -> Iterator[Document]:
        """Yield all documents, unreadable and empty ones included. Raises DataError for a file that breaks off."""
        with CountBar(total=0, title=f"read {', '.join(self.names)}", unit=" documents") as bar:
            bar.total = None
            for read in self._readers:
                for document in read():
                    yield document
                    bar.update()

    def __iter__(self) -> Iterator[Text]:
        """Yield the usable documents. Raises DataError for more than `max_bad` unreadable ones."""
        self.state = ReadState()
        running = hashlib.sha256()
        for document in self.documents():
            if document.problem:
                self._skip(document)
                continue
            if not document.text.strip():
                self.state = self.state._replace(empty=self.state.empty + 1)
                continue
            data = document.text.encode()
            digest = hashlib.sha256(data).digest()
            running.update(digest)
            self.state = self.state._replace(documents=self.state.documents + 1, sha256=running.hexdigest())
            held_out = int.from_bytes(digest[:8]) < self.val_fraction * 2**64
            yield Text(document.text, len(data), held_out, self.state)

    def changed(self, what: str) -> DataError:
        """Return the error for data made from other texts than the corpus holds now."""
        return DataError(
            f"{what} was made from other texts than {', '.join(self.names)} holds now; restore the texts, delete the "
            "folder or choose another one"
        )

    def _skip(self, document: Document) -> None:
        self.state = self.state._replace(unreadable=self.state.unreadable + 1)
        _logger.warning("skipped %s: %s", document.where, document.problem)
        if self.state.unreadable > self.max_bad:
            raise DataError(
                f"{self.state.unreadable} documents are unreadable, more than --max-bad {self.max_bad}; the last: "
                f"{document.where}: {document.problem}. Repair the source or allow more; finished shards are kept"
            )


def _read_text(path: Path, field: str, split_on: re.Pattern[str] | None) -> Iterator[Document]:
    first, lines = 1, []
    for number, line in _lines(path):
        if lines and split_on is not None and split_on.search(line.rstrip("\n")):
            yield _document(f"{path}:{first}", "".join(lines))
            first, lines = number, []
        lines.append(line)
    yield _document(f"{path}:{first}", "".join(lines))


def _read_jsonl(path: Path, field: str, split_on: re.Pattern[str] | None) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Document(where, problem=f"invalid JSON: {error}")
            continue
        if not isinstance(record, dict):
            yield Document(where, problem="not a JSON object")
        elif field not in record:
            yield Document(where, problem=f"no field {field!r}, found {', '.join(record)}")
        else:
            yield _document(where, record[field])


def _read_parquet(path: Path, field: str, split_on: re.Pattern[str] | None) -> Iterator[Document]:
    return _read_table(str(path), field, path="parquet", data_files=escape(str(path.absolute())), split="train")


def _read_table(source: str, field: str, **options: Any) -> Iterator[Document]:
    """Yield the rows of a data set that `datasets.load_dataset` streams; every call begins at the first row."""
    import datasets

    number = 0
    try:
        rows = datasets.load_dataset(streaming=True, **options)
        if rows.features is not None and field not in rows.features:
            raise DataError(f"{source} has no field {field!r}, found {', '.join(rows.features)}; set --field")
        for row in rows if rows.features is None else rows.select_columns([field]):
            number += 1
            yield _document(f"{source}:row {number}", row.get(field))
    except DataError:
        raise
    except Exception as error:  # of datasets, pyarrow, the file system or the HTTP client
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(
            f"{source} cannot be read after row {number} ({reason}); repair it, or run the same command again to resume"
        ) from error


_READERS = {
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}

_HUB_OPTIONS = {"config": "name", **{name: name for name in ("split", "revision", "data_dir", "data_files")}}
"""Options of an hf: source, and the arguments of `datasets.load_dataset` that they set."""


def _readers(name: str, field: str, split_on: re.Pattern[str] | None) -> list[Reader]:
    """Return the readers of a source: of a folder or glob one per file, sorted by name."""
    if name.startswith("hf:"):
        return [partial(_read_table, name, field, **_hub_options(name))]
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [path] if path.is_file() else sorted(map(Path, glob(str(path), recursive=True)))  # noqa: PTH207
    if not files:
        raise DataError(f"source {name!r}: no such file or folder")
    readers: list[Reader] = [
        partial(read, file, field, split_on)
        for file in files
        for suffix, read in _READERS.items()
        if file.name.endswith(suffix)
    ]
    if not readers:
        raise DataError(f"source {name!r} has no file of a supported type: {', '.join(_READERS)}")
    return readers


def _hub_options(name: str) -> dict[str, str]:
    """Return the arguments of `datasets.load_dataset` for an hf: source. Raises ConfigError."""
    path, *given = re.split(r":(?=\w+=)", name.removeprefix("hf:"))  # values may hold colons, as URLs do
    options = dict(option.split("=", 1) for option in given)
    if not path or not options.keys() <= _HUB_OPTIONS.keys():
        allowed = "".join(f"[:{option}=VALUE]" for option in _HUB_OPTIONS)
        raise ConfigError(f"source is {name!r}; it must be hf:NAME{allowed}")
    return {"path": path, "split": "train"} | {_HUB_OPTIONS[option]: value for option, value in options.items()}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a text file; bytes that are not UTF-8 become surrogates, see `_document`."""
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged after line {number} ({error}); download it again") from error


def _document(where: str, text: Any) -> Document:
    if not isinstance(text, str):
        return Document(where, problem=f"expected a text, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start)
        return Document(where, problem=f"line {line + 1} of the text is not valid Unicode")
    return Document(where, text)
