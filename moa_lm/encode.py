"""Documents -> tokens, in worker processes, by any tokenizer of the library `tokenizers`."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moa_lm.convert import existing_source
from moa_lm.data import DTYPES
from moa_lm.documents import Text
from moa_train.atomic_io import new_folder, write_json
from moa_train.reading import read_json
from moa_train.signals import end_with_parent, ignore_stop_signals

_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 2**20, 1024  # what a worker is given at a time, at most
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class Vocabulary(NamedTuple):
    """A tokenizer that is saved in a folder.

    Attributes:
        folder: what AutoTokenizer loads.
        name: for people.
        sha256: of its tokenizer.json.
        size: number of its tokens.
        end_of_text: its end-of-text token.
    """

    folder: Path
    name: str
    sha256: str
    size: int
    end_of_text: int

    @property
    def dtype(self) -> str:
        """The smallest type that holds its tokens."""
        return "uint16" if self.size <= 2**16 else "uint32"


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a name on the hub.

    Raises:
        ValueError: it is damaged; the message names it.
        OSError: there is none.
    """
    name = existing_source(source, "a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # the library `tokenizers` raises nothing more special
        raise ValueError(f"{name}: no tokenizer can be made of it ({error}); copy or download it again") from error


def save_tokenizer(name: str, folder: Path, end_of_text: str | None = None) -> str:
    """Saves the tokenizer that AutoTokenizer finds by `name`, to encode texts as training sees them: nothing is added
    to a text, and what stands before it is end-of-text, also by the name of bos_token.

    Args:
        name: of the tokenizer.
        folder: for it.
        end_of_text: a token of its vocabulary that becomes its eos_token; None: the one that it has.

    Returns:
        The SHA-256 of its tokenizer.json.

    Raises:
        ValueError: if it is none of the library `tokenizers`, has no end-of-text token, or is damaged.
        OSError: if there is none.
    """
    tokenizer = load_tokenizer(name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {name!r} is a {type(tokenizer).__name__} in Python, which has no tokenizer.json; name another"
        )
    if end_of_text is not None:
        if end_of_text not in tokenizer.get_vocab():
            raise ValueError(f"end_of_text is {end_of_text!r}, which is no token of {name!r}; name one that is")
        tokenizer.add_special_tokens({"eos_token": end_of_text})
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no end-of-text token (eos_token); name one of its tokens with --end-of-text"
        )
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        tokenizer.bos_token = tokenizer.eos_token
    adds = tokenizer.num_special_tokens_to_add() > 0
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with new_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        if adds:  # the classes of some models add tokens whatever tokenizer.json says
            path = temporary / "tokenizer_config.json"
            config = read_json(path, "it was written just now")
            write_json(path, config | {"tokenizer_class": PreTrainedTokenizerFast.__name__})
        return hashlib.sha256((temporary / "tokenizer.json").read_bytes()).hexdigest()


def open_vocabulary(folder: Path, name: str) -> Vocabulary:
    """The tokenizer that is saved in a folder, with a tokenizer.json and an end-of-text token.

    Raises:
        ValueError: if it is damaged, or adds tokens to a text.
        OSError: if it is not there.
    """
    tokenizer = load_tokenizer(folder)
    size, end = max(tokenizer.get_vocab().values(), default=-1) + 1, tokenizer.eos_token_id  # numbers may have gaps
    if not isinstance(end, int) or end >= size:
        raise ValueError(f"{folder}: no end-of-text token (eos_token) among the tokens; copy the tokenizer again")
    if tokenizer.num_special_tokens_to_add():
        raise ValueError(f"{folder}: the tokenizer adds special tokens to every text; name another")
    content = (folder / "tokenizer.json").read_bytes()
    return Vocabulary(folder, name, hashlib.sha256(content).hexdigest(), size, end)


class Encoder:
    """Texts -> tokens; the same in any process.

    Args:
        vocabulary: the tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.folder = vocabulary.folder
        self.end_of_text = vocabulary.end_of_text
        self.dtype = DTYPES[vocabulary.dtype]
        self.tokenizer = Tokenizer.from_file(str(vocabulary.folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is text, and ends no document

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, and end-of-text. Raises ValueError for a tokenizer that has none for a word."""
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{self.folder}: the tokenizer cannot encode a text ({error})") from error
        return [np.array([*encoding.ids, self.end_of_text], self.dtype) for encoding in encodings]


def tokenized(
    texts: Iterator[Text], vocabulary: Vocabulary, workers: int
) -> Generator[tuple[list[Text], list[np.ndarray]]]:
    """Lists of documents, in order, with the tokens of each; a few lists are under way at a time.

    Args:
        texts: documents.
        vocabulary: the tokenizer.
        workers: processes; 1: this one.
    """
    chunks = _chunks(texts)
    if workers <= 1:
        encode = Encoder(vocabulary)
        for chunk in chunks:
            yield chunk, encode([text.text for text in chunk])
        return
    waiting: deque[tuple[list[Text], Future[list[np.ndarray]]]] = deque()
    with _one_thread(), ProcessPoolExecutor(workers, initializer=_begin, initargs=(vocabulary,)) as pool:
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_work, [text.text for text in chunk])))
                if len(waiting) > 2 * workers:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            while waiting:
                ready, future = waiting.popleft()
                yield ready, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Lists of documents that are worth sending to a worker."""
    chunk: list[Text] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


_encoder: Encoder | None = None  # of a worker process


def _begin(vocabulary: Vocabulary) -> None:
    global _encoder
    ignore_stop_signals()
    os.environ[_PARALLELISM] = "false"
    end_with_parent()
    _encoder = Encoder(vocabulary)


def _work(texts: list[str]) -> list[np.ndarray]:
    assert _encoder is not None
    return _encoder(texts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps `tokenizers` from starting threads in processes forked here, and from a warning that it does not."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
