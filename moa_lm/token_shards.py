"""Documents -> tokens -> shards and their manifest: the data set that `moa_lm.data` reads.

Documents keep the order of their sources, and a shard ends with the document that fills it: the same texts and
settings give the same bytes. Every finished shard is recorded in an unfinished manifest, from which the same command
resumes: it reads the sources again, verifies by a running SHA-256 that the texts are the same, and tokenizes from the
end of the last finished shard on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moa_lm.data import TOKENIZER
from moa_lm.documents import Corpus, ReadState, Text
from moa_lm.encode import open_vocabulary, save_tokenizer, tokenize, train_bpe
from moa_lm.token_writer import UNFINISHED, Report, TokenSetWriter, earlier_shards
from moa_train.atomic_io import new_folder
from moa_train.errors import ConfigError, DataError, require
from moa_train.manifest import MANIFEST, file_sha256


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Settings that, with the texts, decide the tokens.

    Args:
        tokenizer: Folder or Hub name of a tokenizer, for AutoTokenizer. Exactly one of this and `train_bpe` is set.
        train_bpe: Vocabulary size of a byte-level BPE that is trained on the training documents.
        end_of_text: Token of the tokenizer that ends a document; None: its eos_token.
        field: Text field of a JSONL, Parquet or `datasets` record.
        split_on: Regular expression; a matching line of a text file begins a new document. None: one per file.
        val_fraction: Fraction of the documents, chosen by a hash of the text, that becomes the held-out set.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
        max_tokens: The training set ends with the document that reaches this number of tokens, and documents after it
            are not held out either. None: it ends with the sources.
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
        """Check the ranges. Raises ConfigError naming the field."""
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise ConfigError(f"tokenizer is {self.tokenizer!r} and train_bpe {self.train_bpe!r}; set one of the two")
        if self.end_of_text is not None and self.train_bpe is not None:
            raise ConfigError(f"end_of_text is {self.end_of_text!r} with train_bpe, which has its own; leave it out")
        require("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "0 or above and below 1")
        require("shard_tokens", self.shard_tokens, self.shard_tokens >= 1, "1 or above")
        if self.max_tokens is not None:
            require("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or above")
            if self.train_bpe is not None:
                raise ConfigError(
                    f"max_tokens is {self.max_tokens} with train_bpe, which reads all texts; train the tokenizer on a "
                    "smaller source first, then pass the tokenizer/ folder of that set as tokenizer"
                )


def make_tokens(
    sources: Sequence[str],
    out: str | Path,
    settings: TokenSettings,
    *,
    val_sources: Sequence[str] = (),
    max_bad: int = 100,
) -> list[Report]:
    """Pack documents into token shards in `out`, or with held-out documents in `out`/train and `out`/val.

    Args:
        sources: See `moa_lm.documents.Corpus`.
        out: Destination; created if it does not exist.
        settings: Settings of the tokens.
        val_sources: Sources of held-out documents, instead of `settings.val_fraction`.
        max_bad: Number of unreadable documents per source above which packing fails.

    Raises:
        ConfigError: A setting is invalid, or differs from those that `out` was made with.
        DataError: A source is missing, damaged or empty, its texts changed since an earlier run, or `out` holds
            something else.
    """
    if val_sources and settings.val_fraction:
        raise ConfigError(f"val_fraction is {settings.val_fraction} with val_sources; set one of the two")
    out = Path(out).expanduser()
    reading = {"field": settings.field, "split_on": settings.split_on, "val_fraction": settings.val_fraction}
    corpora = [Corpus(names, **reading, max_bad=max_bad) for names in (sources, val_sources) if names]
    folders = [out / "train", out / "val"] if val_sources or settings.val_fraction else [out]
    _check_folders(out, folders)
    writers = _open_writers(folders, settings, corpora[0], two_sources=bool(val_sources))
    groups = [[writer] for writer in writers] if val_sources else [writers]
    ends = [_pack(corpus, group) for corpus, group in zip(corpora, groups, strict=True)]
    return [
        writer.publish(corpus, end)
        for corpus, group, end in zip(corpora, groups, ends, strict=True)
        for writer in group
    ]


def _open_writers(
    folders: list[Path], settings: TokenSettings, corpus: Corpus, *, two_sources: bool
) -> list[TokenSetWriter]:
    """Return the writers of the sets, each with its tokenizer in place, which is trained here if needed."""
    identity = {**asdict(settings), "val_sources": two_sources, "tokenizer_sha256": None}
    del identity["tokenizer"]
    first = folders[0] / TOKENIZER
    with TemporaryDirectory() as temporary:
        new = Path(temporary, TOKENIZER)
        if settings.tokenizer is not None:
            save_tokenizer(settings.tokenizer, new, settings.end_of_text)
            identity["tokenizer_sha256"] = file_sha256(new / "tokenizer.json")
        earlier = [earlier_shards(folder, identity) for folder in folders]
        if settings.train_bpe is not None and not any(earlier):
            training = (text.text for text in corpus if not text.held_out)
            train_bpe(training, settings.train_bpe).save_pretrained(new)
        for folder in folders:
            if new.exists():
                _copy_folder(new, folder / TOKENIZER)
            elif folder / TOKENIZER != first:
                _copy_folder(first, folder / TOKENIZER)
    name = f"bpe-{settings.train_bpe}" if settings.tokenizer is None else Path(settings.tokenizer).name
    vocabulary = open_vocabulary(first, name)
    return [
        TokenSetWriter(folder, identity, vocabulary, shards, settings.max_tokens if folder == folders[0] else None)
        for folder, shards in zip(folders, earlier, strict=True)
    ]


def _pack(corpus: Corpus, writers: list[TokenSetWriter]) -> ReadState:
    """Tokenize the documents that no kept shard holds, each into its set, and return how far the source was read.

    `max_tokens` of the first set (train) ends the reading for both.
    """
    end: ReadState | None = None
    for text, tokens in tokenize(_missing(corpus, writers), writers[0].vocabulary):
        writers[text.held_out].add(text, tokens, corpus)
        if text.state.documents == writers[0].end:
            end = text.state
            break
    end = end or corpus.state
    for writer in writers:
        writer.close(corpus, end)
    return end


def _missing(corpus: Corpus, writers: list[TokenSetWriter]) -> Iterator[Text]:
    """Yield the documents that no kept shard holds, up to the end of the first set if a kept shard has it."""
    for text in corpus:
        if not writers[text.held_out].holds(text, corpus):
            yield text
        if text.state.documents == writers[0].end:
            return


def _copy_folder(source: Path, destination: Path) -> None:
    with new_folder(destination) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def _check_folders(out: Path, folders: list[Path]) -> None:
    """Raise DataError if `out` holds a data set that this run would not continue."""
    for folder in (out, out / "train", out / "val"):
        manifest, shards = (folder / MANIFEST).exists(), any(folder.glob("*.safetensors"))
        if folder not in folders and (manifest or shards):
            raise DataError(f"{folder} already holds a data set; delete it or choose another --out than {out}")
        if shards and not manifest and not (folder / UNFINISHED).exists():
            raise DataError(f"{folder} holds shards without a manifest; delete them or choose another --out")
