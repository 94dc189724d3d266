"""Documents -> tokens -> shards and their manifest: the data set that `moa_lm.data` reads.

Documents keep the order of their sources, and a shard ends with the document that fills it, so any number of
processes writes the same bytes. A run that was stopped goes on: it reads the sources again, but tokenizes from the
end of the last finished shard only. Whether they are still the same texts is told by a running SHA-256 over all
texts, which every shard's record has.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import save

from moa_lm.bpe import train_bpe
from moa_lm.data import FORMAT, MANIFEST, TENSOR, TOKENIZER, open_tokens, read_manifest
from moa_lm.documents import Corpus, Reading, Skipped, Text
from moa_lm.encode import Vocabulary, open_vocabulary, save_tokenizer, tokenized
from moa_train.atomic_io import new_folder, write_bytes, write_json
from moa_train.config import differing_keys
from moa_train.errors import DataError
from moa_train.reading import read_json

_PARTS = ".parts"  # what an unfinished run needs, in the folder that it writes to
_SETTINGS = "settings.json"
_GIVEN = "given"  # in _PARTS: the tokenizer that was named
_TRAINED = "trained"  # in _PARTS: the one that was trained here, and on what
_ABOUT = "about.json"
_SUMS = ("documents", "tokens", "text_bytes")  # of a shard's record
_ANEW = "delete it to begin anew"
_LATER = {"max_tokens": None, "end_of_text": None}  # settings that older sets do not name


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What decides the tokens, beside the texts.

    Args:
        tokenizer: folder or hub name of a tokenizer, for AutoTokenizer. This or `train_bpe` is given.
        train_bpe: size of the vocabulary of a byte-level BPE that is trained on the training documents.
        end_of_text: token of the tokenizer that ends a document; None: its eos_token.
        field: of a JSONL, Parquet or `datasets` record that is its text.
        split_on: regular expression of the lines of text files that begin a new document; None: a file is one.
        val_fraction: part of the documents, chosen by a hash of their texts, that goes into a set of its own.
        shard_tokens: a shard ends with the document with which it has so many.
        max_tokens: the training set ends with the document with which it has so many, and nothing after that is held
            out either; None: it ends with the sources.
    """

    tokenizer: str | None = None
    train_bpe: int | None = None
    end_of_text: str | None = None
    field: str = "text"
    split_on: str | None = None
    val_fraction: float = 0.0
    shard_tokens: int = 2**26
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the field."""
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise ValueError(f"tokenizer is {self.tokenizer!r} and train_bpe {self.train_bpe!r}; give one of the two")
        if self.end_of_text is not None and self.train_bpe is not None:
            raise ValueError(f"end_of_text is {self.end_of_text!r} with train_bpe, which has its own; leave it out")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; allowed: 0 or more, less than 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; allowed: 1 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; allowed: 1 or more")
        if self.max_tokens is not None and self.train_bpe is not None:
            raise ValueError(
                f"max_tokens is {self.max_tokens} with train_bpe, which reads all texts; train the tokenizer on a "
                "smaller source, then name the folder tokenizer/ of its set as tokenizer"
            )


class Report(NamedTuple):
    """A finished data set: its folder, its numbers, and how many of its shards were there already.

    Attributes:
        folder: of the set.
        documents, tokens: numbers of them; tokens with end-of-text.
        bytes: of the texts, as UTF-8.
        shards, kept_shards: numbers of them.
        vocab_size: number of the tokenizer's tokens.
        skipped: what of its source could not be used; train and val of one source share it.
    """

    folder: Path
    documents: int
    tokens: int
    bytes: int
    shards: int
    kept_shards: int
    vocab_size: int
    skipped: Skipped


def make_tokens(
    sources: Sequence[str],
    out: str | Path,
    settings: TokenSettings,
    *,
    val_sources: Sequence[str] = (),
    workers: int = 1,
    max_bad: int = 100,
) -> list[Report]:
    """Packs documents into `out`, or into `out`/train and `out`/val.

    Args:
        sources: see `moa_lm.documents.Corpus`.
        out: folder, created if absent.
        settings: see `TokenSettings`.
        val_sources: of held-out documents, instead of `settings.val_fraction`.
        workers: processes that tokenize.
        max_bad: unreadable documents of a source after which the run ends with an error.

    Returns:
        One report, or those of train and val.

    Raises:
        ValueError: for a setting out of range, a source that is not there, damaged, empty, or not the one that the
            finished shards of `out` come from, and for an `out` that holds something else.
        OSError: if a file cannot be read or written, or the tokenizer not be found.
    """
    if val_sources and settings.val_fraction:
        raise ValueError(f"val_fraction is {settings.val_fraction} with val_sources; give one of the two")
    out = Path(out).expanduser()
    names = [list(named) for named in (sources, val_sources) if named]
    corpora = [Corpus(named, field=settings.field, split_on=settings.split_on) for named in names]
    with _exclusive(out) as parts:
        folders = [out / "train", out / "val"] if val_sources or settings.val_fraction else [out]
        _check_folders(out, folders, begun=(parts / _SETTINGS).exists())
        identity = _identity(settings, parts, folders, two_sources=bool(val_sources))
        readings = [Reading(corpus, settings.val_fraction, max_bad, f"read {out}") for corpus in corpora]
        vocabulary = _tokenizer(settings, parts, folders[0], readings[0])
        limits = (settings.max_tokens, None)  # of training documents, and of held-out ones
        writers = [
            SetWriter(folder, parts, identity, vocabulary, limit)
            for folder, limit in zip(folders, limits, strict=False)
        ]
        groups = [[writer] for writer in writers] if val_sources else [writers]
        for reading, group in zip(readings, groups, strict=True):
            _pack(reading, group, vocabulary, workers)
        if settings.train_bpe is not None:
            _check_trained(parts, readings[0])
        pairs = [(writer, reading) for reading, group in zip(readings, groups, strict=True) for writer in group]
        reports = [writer.publish(reading) for writer, reading in pairs]
        shutil.rmtree(parts)
    return reports


class SetWriter:
    """Packs the documents of one set into shards; those that an earlier run finished are kept.

    Args:
        folder: of the set.
        parts: where the records of finished shards are.
        identity: the settings; see `_identity`.
        vocabulary: of the tokens.
        max_tokens: that it is to have; None: those of all documents.

    Attributes:
        covered: number of the last document that is in a kept shard.
        end: number of the document with which it has `max_tokens`; None: it has less.
    """

    def __init__(
        self, folder: Path, parts: Path, identity: dict[str, Any], vocabulary: Vocabulary, max_tokens: int | None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.parts = parts
        self.identity = identity
        self.vocabulary = vocabulary
        self.finished: dict[str, Any] | None = None  # the manifest of a set that is whole
        self.records = self._finished_shards()
        self.kept = len(self.records)
        self.covered: int = self.records[-1]["until"] if self.records else 0
        self.end: int | None = None
        self._left = math.inf if max_tokens is None else max_tokens
        self._count(sum(record["tokens"] for record in self.records), self.covered)
        self._ends = {record["until"]: record for record in self.records}
        self._pieces: list[np.ndarray] = []
        self._tokens = self._bytes = 0
        self._last = Text(0, "", 0, False, "")

    def has(self, text: Text, reading: Reading) -> bool:
        """Whether a kept shard holds this document. Raises ValueError where the texts up to it are other ones."""
        end = self._ends.pop(text.number, None)
        if end is not None and end["until_sha256"] != text.sha256:
            raise reading.changed(str(self.folder / end["name"]))
        return text.number <= self.covered

    def add(self, text: Text, tokens: np.ndarray, reading: Reading) -> None:
        """Puts a document and its tokens into the current shard; writes it if it is full.

        Raises:
            ValueError: if the set was whole without it, so that the texts are other ones.
        """
        if self.finished is not None:
            raise reading.changed(str(self.folder))
        self._count(len(tokens), text.number)
        self._pieces.append(tokens)
        self._tokens += len(tokens)
        self._bytes += text.bytes
        self._last = text
        if self._tokens >= self.identity["shard_tokens"]:
            self._write()

    def close(self, reading: Reading) -> None:
        """Writes what is left. Raises ValueError if the documents ended before the kept shards did."""
        if self._ends:
            raise reading.changed(str(self.folder))
        if self._pieces:
            self._write()

    def publish(self, reading: Reading) -> Report:
        """Writes the manifest that makes the set valid. Raises ValueError if the set is empty, or was another's."""
        source = {
            "names": list(reading.corpus.names),
            "documents": reading.documents,
            "sha256": reading.sha256,
            "empty": reading.skipped.empty,
            "unusable": reading.skipped.unusable,
        }
        if not self.records:
            raise ValueError(self._empty(reading))
        if self.finished is None:
            with new_folder(self.folder / TOKENIZER) as folder:
                shutil.copytree(self.vocabulary.folder, folder, dirs_exist_ok=True)
            names = {record["name"] for record in self.records}
            for path in self.folder.glob("shard-*.safetensors"):
                if path.name not in names:  # of a larger set that was here
                    path.unlink()
            write_json(self.folder / MANIFEST, self._manifest(source))
        elif self.finished["source"]["sha256"] != source["sha256"]:
            raise reading.changed(str(self.folder))
        documents, tokens, size = (sum(record[key] for record in self.records) for key in _SUMS)
        shards, vocab_size = len(self.records), self.vocabulary.size
        return Report(self.folder, documents, tokens, size, shards, self.kept, vocab_size, reading.skipped)

    def _manifest(self, source: dict[str, Any]) -> dict[str, Any]:
        documents, tokens, size = (sum(record[key] for record in self.records) for key in _SUMS)
        return {
            "format": FORMAT,
            "tokens": tokens,
            "documents": documents,
            "bytes": size,
            "vocab_size": self.vocabulary.size,
            "end_of_text": self.vocabulary.end_of_text,
            "dtype": self.vocabulary.dtype,
            "tokenizer": {"name": self.vocabulary.name, "sha256": self.vocabulary.sha256},
            "source": source,
            "settings": self.identity,
            "shards": self.records,
        }

    def _empty(self, reading: Reading) -> str:
        names = ", ".join(reading.corpus.names)
        if reading.documents:
            return (
                f"of the {reading.documents} documents of {names} none is left for {self.folder}; change "
                f"val_fraction ({reading.val_fraction}), split the texts into more documents (--split-on), or "
                "name held-out ones (--val-source)"
            )
        first = reading.skipped.named[:1]
        return f"{names} holds no document that can be used{f'; the first: {first[0]}' if first else ''}"

    def _count(self, tokens: int, number: int) -> None:
        """Takes note of so many more tokens, the last of them of this document."""
        self._left -= tokens
        if self._left <= 0:
            self.end = number

    def _write(self) -> None:
        """Writes the current shard, then its record."""
        name = _name(len(self.records))
        content = save({TENSOR: np.concatenate(self._pieces)})
        write_bytes(self.folder / name, content)
        record = {
            "name": name,
            "tokens": self._tokens,
            "documents": len(self._pieces),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "text_bytes": self._bytes,
            "until": self._last.number,
            "until_sha256": self._last.sha256,
        }
        self._keep(record)
        self.records.append(record)
        self._pieces, self._tokens, self._bytes = [], 0, 0

    def _keep(self, record: dict[str, Any]) -> None:
        write_json(self.parts / f"{self.folder.name}-{record['name']}.json", record)

    def _finished_shards(self) -> list[dict[str, Any]]:
        """The records of the shards, from the first on, that an earlier run finished and that are whole."""
        listed: list[dict[str, Any]]
        manifest = _finished(self.folder) if (self.folder / MANIFEST).exists() else None
        if manifest is None:
            paths = sorted(self.parts.glob(f"{self.folder.name}-shard-*.json"))
            listed = [read_json(path, f"delete it, to make {self.folder} from that shard on anew") for path in paths]
        else:
            listed = manifest["shards"]
        whole = [record for _, record in takewhile(self._is_whole, enumerate(listed))]
        if manifest is not None and len(whole) == len(listed):
            self.finished = manifest
            return whole
        full = list(takewhile(lambda record: record["tokens"] >= self.identity["shard_tokens"], whole))
        for record in full:  # before the manifest goes, so that a run that is stopped again finds them
            self._keep(record)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        return full

    def _is_whole(self, numbered: tuple[int, dict[str, Any]]) -> bool:
        """Whether a record says all that it must, and its shard is there as it says."""
        number, record = numbered
        counts = [record.get(key) for key in (*_SUMS, "bytes", "until")]
        texts = record.get("name") == _name(number) and isinstance(record.get("until_sha256"), str)
        if not texts or not all(type(count) is int and count > 0 for count in counts):
            return False
        try:
            os.close(open_tokens(self.folder / _name(number), self.vocabulary.dtype, record["tokens"])[0])
            with (self.folder / _name(number)).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.get("sha256")
        except (OSError, SafetensorError, DataError):
            return False


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def _finished(folder: Path) -> dict[str, Any]:
    """The manifest of a set that an earlier run made. Raises ValueError if it cannot be gone on with."""
    manifest = read_manifest(folder)
    source = manifest.get("source")
    if not isinstance(manifest.get("settings"), dict) or not isinstance(source, dict) or "sha256" not in source:
        raise ValueError(f"{folder / MANIFEST} does not say what {folder} was made from; {_ANEW}")
    return manifest


def _pack(reading: Reading, writers: list[SetWriter], vocabulary: Vocabulary, workers: int) -> None:
    """Tokenizes the documents that no kept shard holds, each into its set (train, and val where it is split off).

    The first set's end is that of the reading.
    """
    with closing(tokenized(_missing(reading, writers), vocabulary, workers)) as chunks:
        for text, piece in (pair for chunk in chunks for pair in zip(*chunk, strict=True)):
            writers[text.held_out].add(text, piece, reading)
            if text.number == writers[0].end:
                reading.end_at(text)
                break
    for writer in writers:
        writer.close(reading)


def _missing(reading: Reading, writers: list[SetWriter]) -> Iterator[Text]:
    """The documents that no kept shard holds, to the first set's end where that is in a kept shard."""
    for text in reading:
        if not writers[text.held_out].has(text, reading):
            yield text
        if text.number == writers[0].end:
            return


def _tokenizer(settings: TokenSettings, parts: Path, first: Path, reading: Reading) -> Vocabulary:
    """The tokenizer: the given one, or the trained one, trained now or by an earlier run."""
    if settings.train_bpe is None:
        return open_vocabulary(parts / _GIVEN, Path(settings.tokenizer or "").name)
    folder = parts / _TRAINED / TOKENIZER
    if (first / MANIFEST).exists():
        folder = first / TOKENIZER
    elif not folder.exists():
        _train(settings.train_bpe, parts / _TRAINED, reading)
    return open_vocabulary(folder, f"bpe-{settings.train_bpe}")


def _train(vocab_size: int, folder: Path, reading: Reading) -> None:
    """Trains a tokenizer on the documents that are not held out, and notes which they were."""
    tokenizer = train_bpe((text.text for text in reading if not text.held_out), vocab_size)
    with new_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary / TOKENIZER)
        write_json(temporary / _ABOUT, {"documents": reading.documents, "sha256": reading.sha256})


def _check_trained(parts: Path, reading: Reading) -> None:
    """Raises ValueError if the tokenizer in `parts` was trained on other documents than were packed."""
    about = parts / _TRAINED / _ABOUT
    if about.exists() and read_json(about, f"{parts} belongs to it, {_ANEW}").get("sha256") != reading.sha256:
        raise reading.changed(str(parts / _TRAINED))


def _identity(settings: TokenSettings, parts: Path, folders: list[Path], *, two_sources: bool) -> dict[str, Any]:
    """What decides the tokens, beside the texts, wherever they and the tokenizer lie; noted in `parts`.

    Raises:
        ValueError: if the sets that are there, whole or not, were made with other settings.
    """
    identity = {**asdict(settings), "val_sources": two_sources}
    given = identity.pop("tokenizer")
    if given is not None:
        given = save_tokenizer(given, parts / _GIVEN, settings.end_of_text)
    identity["tokenizer_sha256"] = given
    for folder in folders:
        if (folder / MANIFEST).exists():
            _check_same(folder, _finished(folder)["settings"], identity)
    path = parts / _SETTINGS
    then = read_json(path, f"{parts} belongs to it, {_ANEW}") if path.exists() else None
    if then is not None and any(parts.glob("*-shard-*.json")):
        _check_same(parts.parent, then, identity)
    elif then != identity:
        shutil.rmtree(parts / _TRAINED, ignore_errors=True)  # of other settings, and all that there is of them
        write_json(path, identity)
    return identity


def _check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := differing_keys(_LATER | then, now, mutable_keys=frozenset()):
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(differing)}); give those again, choose another "
            "folder, or delete that one"
        )


def _check_folders(out: Path, folders: list[Path], *, begun: bool) -> None:
    """Raises ValueError if there is a data set that this run would not go on with."""
    for folder in (out, out / "train", out / "val"):
        manifest, shards = (folder / MANIFEST).exists(), any(folder.glob("*.safetensors"))
        if folder not in folders and (manifest or shards):
            raise ValueError(f"{folder} holds a data set already; choose another --out than {out}, or delete it")
        if shards and not manifest and not begun:
            raise ValueError(f"{folder} holds shards that no manifest lists; choose another --out, or delete them")


@contextmanager
def _exclusive(out: Path) -> Iterator[Path]:
    """Takes the folder for this run; gives its folder for parts. Raises ValueError if another run writes to it."""
    parts = out / _PARTS
    parts.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parts / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out} is being written by another run; wait for it, or choose another") from error
    try:
        yield parts
    finally:
        lock.release()
