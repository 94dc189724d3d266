"""Tokenizers, saved or trained, and documents -> tokens by any tokenizer of the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moa_lm.convert import existing_source
from moa_lm.data import DTYPES
from moa_lm.documents import Text
from moa_train.atomic_io import new_folder, write_json
from moa_train.errors import ConfigError, DataError, require
from moa_train.manifest import file_sha256
from moa_train.reading import read_json

END_OF_TEXT = "<|endoftext|>"
"""End-of-text token of trained tokenizers."""

MIN_VOCAB_SIZE = 257
"""Size of a byte-level vocabulary without merges: 256 bytes and end-of-text."""

_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 2**22, 8192
"""A chunk, which is encoded in parallel, ends with the document that reaches one of the two."""


class Vocabulary(NamedTuple):
    """A tokenizer that is saved in a folder.

    Attributes:
        folder: Folder that AutoTokenizer loads.
        name: Name in manifests.
        sha256: SHA-256 of its tokenizer.json.
        size: Number of its tokens.
        end_of_text: Its end-of-text token.
    """

    folder: Path
    name: str
    sha256: str
    size: int
    end_of_text: int

    @property
    def dtype(self) -> str:
        """The smallest dtype that holds every token."""
        return "uint16" if self.size <= 2**16 else "uint32"


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the Hub. Raises DataError naming it if it cannot be loaded."""
    name = existing_source(source, "a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of huggingface_hub, transformers or tokenizers, which raises plain Exception
        raise DataError(f"{name}: cannot load the tokenizer ({error}); copy or download it again") from error


def save_tokenizer(name: str, folder: Path, end_of_text: str | None = None) -> None:
    """Save a tokenizer that encodes texts as in training: no special tokens are added, and bos_token is eos_token.

    Args:
        name: Folder or Hub name of the tokenizer.
        folder: Destination.
        end_of_text: Token of the vocabulary that becomes eos_token; None keeps the tokenizer's own.

    Raises:
        ConfigError: The tokenizer has no tokenizer.json or no end-of-text token.
        DataError: The tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"tokenizer {name!r} is a {type(tokenizer).__name__} without tokenizer.json; use a fast tokenizer"
        )
    if end_of_text is not None:
        if end_of_text not in tokenizer.get_vocab():
            raise ConfigError(f"end_of_text is {end_of_text!r}; it must be a token of {name!r}")
        tokenizer.add_special_tokens({"eos_token": end_of_text})
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no eos_token; set --end-of-text to one of its tokens")
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        tokenizer.bos_token = tokenizer.eos_token
    adds_tokens = tokenizer.num_special_tokens_to_add() > 0
    if adds_tokens:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with new_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        if adds_tokens:  # some models' tokenizer classes add tokens regardless of tokenizer.json
            path = temporary / "tokenizer_config.json"
            config = read_json(path, "it was just written")
            write_json(path, config | {"tokenizer_class": PreTrainedTokenizerFast.__name__})


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer like GPT-2's: its pre-tokenizer, all 256 bytes, and merges learned from `texts`.

    The same texts in the same order give the same tokenizer. `<|endoftext|>` (token 0) is both bos_token and
    eos_token; encoding adds neither.

    Args:
        texts: Training texts; read once.
        vocab_size: Number of tokens, at least 257. Texts with too few different words give fewer.

    Raises:
        ConfigError: `vocab_size` is too small.
    """
    require("train_bpe", vocab_size, vocab_size >= MIN_VOCAB_SIZE, f"{MIN_VOCAB_SIZE} or above")
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = ByteLevelProcessor(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def open_vocabulary(folder: Path, name: str) -> Vocabulary:
    """Return the tokenizer saved in a folder. Raises DataError if it is damaged or adds tokens to a text."""
    tokenizer = load_tokenizer(folder)
    size, end = max(tokenizer.get_vocab().values(), default=-1) + 1, tokenizer.eos_token_id  # ids may have gaps
    if not isinstance(end, int) or end >= size:
        raise DataError(f"{folder}: the tokenizer has no eos_token in its vocabulary; copy it again")
    if tokenizer.num_special_tokens_to_add():
        raise DataError(f"{folder}: the tokenizer adds special tokens to every text; use another one")
    return Vocabulary(folder, name, file_sha256(folder / "tokenizer.json"), size, end)


def tokenize(texts: Iterator[Text], vocabulary: Vocabulary) -> Iterator[tuple[Text, np.ndarray]]:
    """Yield documents in order, each with its tokens, end-of-text included; `texts` is read ahead by two chunks.

    A chunk is encoded on all cores, while this thread reads the next one and converts the tokens of the last one.

    Raises:
        DataError: The tokenizer cannot encode a text.
    """
    tokenizer = Tokenizer.from_file(str(vocabulary.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is plain text

    def encode(chunk: list[Text]) -> tuple[list[Text], list[Encoding]]:
        try:
            return chunk, tokenizer.encode_batch_fast([text.text for text in chunk], add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"{vocabulary.folder}: the tokenizer cannot encode a text ({error})") from error

    with ThreadPoolExecutor(1) as thread:
        encoded = (thread.submit(encode, chunk) for chunk in _chunks(texts))
        for future, _next in pairwise(chain(encoded, [None])):  # submits the next chunk before it waits for this one
            assert future is not None
            for text, encoding in zip(*future.result(), strict=True):
                yield text, np.array([*encoding.ids, vocabulary.end_of_text], DTYPES[vocabulary.dtype])


def _chunks(texts: Iterator[Text]) -> Iterator[list[Text]]:
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
