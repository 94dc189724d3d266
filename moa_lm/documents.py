"""Where texts come from: files, folders and Hugging Face data sets -> documents, one after another."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moa_train.progress import CountBar

_NAMED_EMPTY = 10  # empty documents that are named; all are counted

_LARGE, _TOO_LARGE = 2**26, 2**30  # bytes of a document; a byte took 100 bytes of memory while it was tokenized

_logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text of a source.

    Attributes:
        where: it stands: FILE:LINE, FILE:row N or DATA SET:row N, counted from 1.
        text: it.
        problem: why it cannot be used; "" where it can.
    """

    where: str
    text: str = ""
    problem: str = ""


class Source(Protocol):
    """Something that holds documents.

    Attributes:
        size: in bytes, as stored; None: not known.
    """

    size: int | None

    @property
    def done(self) -> int:
        """Stored bytes that the latest reading has behind it."""
        ...

    def __iter__(self) -> Iterator[Document]: ...


class Corpus:
    """The documents of several sources, source after source; may be read again and again, with the same result.

    Args:
        sources: each a text, JSONL or Parquet file (.txt, .jsonl, .parquet; the first two also .gz), a folder of
            such, a glob, or hf:NAME[:OPTION=VALUE]..., a data set that `datasets` finds on the Hub or in a folder and
            streams; options are config, split ("train" if not given), revision, data_dir and data_files.
        field: of a record that is its text.
        split_on: regular expression; a line of a text file in which it is found begins a new document. None: a text
            file is one document.

    Attributes:
        size: in bytes, as stored; None: not known.

    Raises:
        ValueError: if a source is not there or holds no such file, or the expression is none.
    """

    def __init__(self, sources: Sequence[str], *, field: str = "text", split_on: str | None = None) -> None:
        try:
            pattern = None if split_on is None else re.compile(split_on)
        except re.error as error:
            raise ValueError(f"split_on is {split_on!r}, which is no regular expression: {error}") from error
        self.names = tuple(sources)
        self._sources = [opened for name in sources for opened in _open(name, field, pattern)]
        if split_on is not None and not any(isinstance(source, TextFile) for source in self._sources):
            raise ValueError(
                f"split_on is {split_on!r}, but {', '.join(sources)} holds no text file that it could split"
            )
        self._current: Source | None = None
        self._behind = 0  # bytes of the sources before it
        sizes = [source.size for source in self._sources]
        self.size = None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def done(self) -> int:
        """Stored bytes that the latest reading has behind it, where they are known."""
        return self._behind + (self._current.done if self._current else 0)

    def __iter__(self) -> Iterator[Document]:
        """The documents, also those that cannot be used. Raises ValueError for a file that cannot be read at all."""
        self._behind = 0
        for source in self._sources:
            self._current = source
            for document in source:
                if document.problem or document.text.strip():
                    yield document
                else:
                    yield Document(document.where, problem="empty")
            self._behind += source.size or 0
            self._current = None


class Skipped:
    """Counts the documents that cannot be used, and ends a run that has too many.

    Args:
        limit: how many are put up with, beside empty ones.

    Attributes:
        empty: number of documents without a text.
        unusable: number of those that cannot be read.
        named: where they are and what is wrong: all that cannot be read and the first empty ones.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.empty = 0
        self.unusable = 0
        self.named: list[dict[str, str]] = []

    def add(self, document: Document) -> None:
        """Counts a document. Raises ValueError beyond the limit."""
        if document.problem == "empty":
            self.empty += 1
            if self.empty > _NAMED_EMPTY:
                return
        else:
            self.unusable += 1
        self.named.append({"where": document.where, "problem": document.problem})
        if self.unusable > self.limit:
            raise ValueError(
                f"{self.unusable} documents cannot be read, more than --max-bad {self.limit} allows; the last: "
                f"{document.where}: {document.problem}. Mend the source, or allow more: finished shards are kept"
            )

    def keep(self, empty: int, unusable: int) -> None:
        """Forgets all but so many, the first ones."""
        self.empty, self.unusable = empty, unusable
        del self.named[min(empty, _NAMED_EMPTY) + unusable :]


class Text(NamedTuple):
    """A usable document.

    Attributes:
        number: of the usable documents of its corpus, counted from 1.
        text: it.
        bytes: its length as UTF-8.
        held_out: whether it belongs to the held-out set, where one is split off.
        sha256: of the texts up to and with this one.
        skipped: numbers of the documents before it that are empty, and that cannot be read.
    """

    number: int
    text: str
    bytes: int
    held_out: bool
    sha256: str
    skipped: tuple[int, int] = (0, 0)


class Reading:
    """The usable documents of a corpus, numbered and fingerprinted, with a progress bar; may be read again.

    Args:
        corpus: of documents.
        val_fraction: part of them that is held out.
        max_bad: see `Skipped`.
        title: of the progress bar.

    Attributes:
        documents: how many there are; known after reading, as the following.
        sha256: of the SHA-256 of each text, in order.
        skipped: those that are not usable.
    """

    def __init__(self, corpus: Corpus, val_fraction: float, max_bad: int, title: str) -> None:
        self.corpus = corpus
        self.val_fraction = val_fraction
        self.max_bad = max_bad
        self.title = title
        self.documents = 0
        self.sha256 = ""
        self.skipped = Skipped(max_bad)

    def __iter__(self) -> Iterator[Text]:
        self.documents, self.skipped = 0, Skipped(self.max_bad)
        running = hashlib.sha256()
        with CountBar(total=self.corpus.size or 0, title=self.title, unit="B") as bar:
            bar.total, bar.unit_scale = self.corpus.size, True
            for document in self.corpus:
                if document.problem:
                    self.skipped.add(document)
                    continue
                data = document.text.encode()
                own = hashlib.sha256(data).digest()
                running.update(own)
                self.documents, self.sha256 = self.documents + 1, running.hexdigest()
                held_out = int.from_bytes(own[:8]) < self.val_fraction * 2**64
                skipped = self.skipped.empty, self.skipped.unusable
                yield Text(self.documents, document.text, len(data), held_out, self.sha256, skipped)
                bar.update(self.corpus.done - bar.n)

    def end_at(self, text: Text) -> None:
        """Leaves what was read after this text out of account; how far that was depends on the number of workers."""
        self.documents, self.sha256 = text.number, text.sha256
        self.skipped.keep(*text.skipped)

    def changed(self, then: str) -> ValueError:
        """The error that these are other documents than those that `then` was made from."""
        names = ", ".join(self.corpus.names)
        return ValueError(
            f"{then} was made from other texts than {names} holds now. Bring the old texts back, choose another "
            "folder, or delete that one"
        )


class FileSource:
    """A file that is read line by line, packed by gzip or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size: int | None = path.stat().st_size
        self._raw: Any = None

    @property
    def done(self) -> int:
        """See `Source`."""
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines with their numbers, counted from 1. Raises ValueError where the packed file is damaged."""
        number = 0
        with ExitStack() as stack:
            self._raw = file = stack.enter_context(self.path.open("rb"))
            if self.path.suffix == ".gz":
                file = stack.enter_context(gzip.open(self._raw))
            try:
                for number, line in enumerate(file, 1):
                    yield number, line
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{self.path} is damaged after line {number}: {error}; fetch it again") from error


class TextFile(FileSource):
    """A text, or several that begin where a line matches."""

    def __init__(self, path: Path, field: str, split_on: re.Pattern[str] | None) -> None:
        super().__init__(path)
        self.split_on = split_on

    def __iter__(self) -> Iterator[Document]:
        first, size, lines = 1, 0, []
        for number, line in self.lines():
            if lines and self._begins(line):
                yield self._document(first, lines)
                first, size, lines = number, 0, []
            lines.append(line)
            self._check(first, size, size + len(line))
            size += len(line)
        yield self._document(first, lines)

    def _check(self, first: int, before: int, now: int) -> None:
        """Warns of a document that grows large, of so many bytes. Raises ValueError of one that is too large."""
        if now <= _LARGE:
            return
        where, remedy = f"{self.path}:{first}", "begin a new one at some lines with --split-on"
        if now > _TOO_LARGE:
            raise ValueError(f"{where} begins a document of more than {_TOO_LARGE:,} bytes; {remedy}")
        if before <= _LARGE:
            message = "%s begins one document of more than %s bytes, which takes up to 100 times that of memory; %s"
            _logger.warning(message, where, f"{_LARGE:,}", remedy)

    def _begins(self, line: bytes) -> bool:
        return self.split_on is not None and bool(self.split_on.search(line.decode(errors="replace").rstrip("\r\n")))

    def _document(self, first: int, lines: list[bytes]) -> Document:
        """The document that begins at line `first`, its line ends as Python's text files have them."""
        data = b"".join(lines)
        try:
            text = data.decode("utf-8-sig" if first == 1 else "utf-8")
        except UnicodeDecodeError as error:
            line = first + data.count(b"\n", 0, error.start)
            return Document(f"{self.path}:{line}", problem=f"byte {data[error.start]:#04x} is not UTF-8")
        return Document(f"{self.path}:{first}", text.replace("\r\n", "\n").replace("\r", "\n"))


class JsonLines(FileSource):
    """An object a line, whose `field` is a text. Blank lines are none."""

    def __init__(self, path: Path, field: str, split_on: re.Pattern[str] | None) -> None:
        super().__init__(path)
        self.field = field

    def __iter__(self) -> Iterator[Document]:
        for number, line in self.lines():
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield Document(where, problem=f"not JSON: {error}")
                continue
            if isinstance(record, dict) and self.field not in record:
                yield Document(where, problem=f"no field {self.field!r}, only {', '.join(record)}")
            elif isinstance(record, dict):
                yield _of_value(where, self.field, record[self.field])
            elif line.strip():
                yield Document(where, problem="not a JSON object")


class ParquetFile:
    """A table whose column `field` holds texts."""

    def __init__(self, path: Path, field: str, split_on: re.Pattern[str] | None) -> None:
        self.path = path
        self.field = field
        self.size: int | None = path.stat().st_size
        self.done = 0

    def __iter__(self) -> Iterator[Document]:
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as table:
                if self.field not in table.schema_arrow.names:
                    raise ValueError(_no_column(str(self.path), self.field, table.schema_arrow.names))
                row = 0
                for batch in table.iter_batches(batch_size=1024, columns=[self.field]):
                    for value in batch.column(0):
                        row += 1
                        yield self._document(row, value)
                    self.done = (self.size or 0) * row // table.metadata.num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {error}; fetch it again") from error

    def _document(self, row: int, value: Any) -> Document:
        """The document of a cell, a pyarrow scalar."""
        where = f"{self.path}:row {row}"
        try:
            return _of_value(where, self.field, value.as_py())
        except UnicodeDecodeError as error:  # Parquet does not look into texts
            return Document(where, problem=f"byte {error.object[error.start]:#04x} is not UTF-8")


_HUB_OPTIONS = {"config": "name", **{name: name for name in ("split", "revision", "data_dir", "data_files")}}
"""Options of an hf: source, and the arguments of `datasets.load_dataset` that they are."""


class HubRows:
    """A data set that `datasets.load_dataset` streams, from the Hub or from a folder.

    Every reading begins at its first row: `datasets` could go on where an earlier one ended, but the SHA-256 over the
    texts, which tells that they are still the same, could not.
    """

    def __init__(self, name: str, field: str) -> None:
        import datasets

        self.size: int | None = None
        self.done = 0
        path, options = _hub_options(name)
        try:
            data = datasets.load_dataset(path, streaming=True, **options)
        except Exception as error:  # see _row
            raise ValueError(f"source {name!r} cannot be opened: {_told(error)}") from error
        if data.features is not None and field not in data.features:
            raise ValueError(_no_column(f"source {name!r}", field, list(data.features)))
        self.name = name
        self.field = field
        self.rows: Any = data if data.features is None else data.select_columns([field])

    def __iter__(self) -> Iterator[Document]:
        rows, number = iter(self.rows), 0
        while (row := self._row(rows, number)) is not None:
            number += 1
            if self.field not in row:
                raise ValueError(_no_column(f"source {self.name!r}", self.field, list(row)))
            yield _of_value(f"{self.name}:row {number}", self.field, row[self.field])

    def _row(self, rows: Iterator[dict[str, Any]], number: int) -> dict[str, Any] | None:
        """The next row; None: there is none. Raises ValueError where it cannot be had."""
        try:
            return next(rows, None)
        except Exception as error:  # of `datasets`, of pyarrow, of whatever file system and HTTP client they have
            raise ValueError(
                f"source {self.name!r} broke off after row {number}: {_told(error)}. The same command goes on: "
                "it reads from the first row on, and tokenizes from the end of the last finished shard on"
            ) from error


def _hub_options(name: str) -> tuple[str, dict[str, Any]]:
    """What an hf: source names, and the arguments for `datasets.load_dataset`. Raises ValueError."""
    path, *given = re.split(r":(?=\w+=)", name.removeprefix("hf:"))  # a value may hold colons: a URL
    options = {"split": "train"} | dict(option.split("=", 1) for option in given)
    if not path or not options.keys() <= _HUB_OPTIONS.keys():
        allowed = "".join(f"[:{option}=VALUE]" for option in _HUB_OPTIONS)
        raise ValueError(f"source {name!r}: allowed is hf:NAME{allowed}")
    if "[" in options["split"]:
        raise ValueError(
            f"source {name!r}: a stream has no part of a split; name the whole split, and end it with --max-tokens"
        )
    return path, {_HUB_OPTIONS[option]: value for option, value in options.items()}


def _told(error: Exception) -> str:
    """An error in one line; some libraries' have no message of their own."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_KINDS: dict[str, type[TextFile] | type[JsonLines] | type[ParquetFile]] = {
    ".txt": TextFile,
    ".txt.gz": TextFile,
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".parquet": ParquetFile,
}


def _open(name: str, field: str, split_on: re.Pattern[str] | None) -> list[Source]:
    """What a source's name means, files in the order of their names."""
    if name.startswith("hf:"):
        return [HubRows(name, field)]
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        matches = glob(str(path), recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
        found = sorted(Path(match) for match in matches)  # a plain file matches itself
    if not found:
        raise ValueError(f"source {name!r}: no such file or folder")
    kinds = [(file, _kind(file)) for file in found]
    opened: list[Source] = [kind(file, field, split_on) for file, kind in kinds if kind is not None]
    if not opened:
        raise ValueError(f"source {name!r} holds no text; read are {', '.join(_KINDS)}")
    return opened


def _kind(file: Path) -> type[TextFile] | type[JsonLines] | type[ParquetFile] | None:
    return next((kind for suffix, kind in _KINDS.items() if file.name.endswith(suffix)), None)


def _of_value(where: str, field: str, value: Any) -> Document:
    """The document of a record's field."""
    if not isinstance(value, str):
        return Document(where, problem=f"field {field!r} is a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        return Document(where, problem=f"character {value[error.start]!r} is no Unicode text")
    return Document(where, value)


def _no_column(what: str, field: str, names: list[str]) -> str:
    return f"{what} has no field {field!r}, only {', '.join(names)}; name one of them with --field"
