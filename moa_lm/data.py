"""Token shards -> batches (B, T + 1) of tokens; their order is a function of (seed, epoch, position).

A data set is one stream of tokens, every document followed by end-of-text. Sample i is the window of T + 1 tokens
that begins at token i T: the first T are inputs, the last T their labels. `moa_lm.token_shards` writes such sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moa_train.data_order import ORDER, StepBatches, batch_loader, generator, philox_key
from moa_train.errors import DataError, require
from moa_train.open_files import OpenFiles, open_to_read

MANIFEST = "manifest.json"
FORMAT = "moa-tokens-1"
TOKENIZER = "tokenizer"
"""Folder of the tokenizer, beside the manifest."""

TENSOR = "tokens"
"""Name of a shard's only tensor."""

DTYPES = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}

_COUNTS = ("tokens", "documents", "bytes")
_MAX_COUNT = 2**62  # a larger one is a mistake

_OPEN_FILES = 64  # file descriptors that a reader keeps


@dataclass(frozen=True, kw_only=True)
class TokenDataConfig:
    """Where the tokens are and how they become batches.

    Args:
        train: Folder of training shards, made by scripts/make_tokens.py.
        val: Folder of held-out shards with the same tokenizer; none: no validation.
        sequence_length: Tokens that the model sees at once; a sample has one more.
        document_mask: Attention and labels stay within documents. A step's loss is the mean over the labels of its
            global batch, of which there are a few less than tokens.
        workers: Processes that read tokens, per device; 0: the training process itself, which is fast enough on a
            local disk.
    """

    train: str
    val: str | None = None
    sequence_length: int = 1024
    document_mask: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("data.sequence_length", self.sequence_length, self.sequence_length >= 1, "1 or above")
        require("data.workers", self.workers, self.workers >= 0, "0 or above")


class TokenBatch(NamedTuple):
    """B windows of the token stream.

    Attributes:
        tokens: (B, T + 1) int64: inputs are the first T, labels the last T.
        windows: their B numbers; window w of length T begins at token w T of the stream.
    """

    tokens: Tensor
    windows: tuple[int, ...] = ()


class TokenShards:
    """A folder of token shards, its manifest checked; shards are opened when they are first read.

    Args:
        folder: with manifest.json, shard-*.safetensors and tokenizer/.

    Attributes:
        folder: the same, as a path.
        manifest: what manifest.json says.
        tokens: of the whole stream, end-of-text included.
        documents: of the whole stream.
        vocab_size: number of the tokenizer's tokens.
        end_of_text: the token after every document.
        bytes_per_token: UTF-8 bytes of the texts / tokens.
        tokenizer_folder: what AutoTokenizer loads.

    Raises:
        DataError: if the manifest or a shard is missing, damaged or of another size than it should be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.tokens: int = self.manifest["tokens"]
        self.documents: int = self.manifest["documents"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end_of_text: int = self.manifest["end_of_text"]
        self.bytes_per_token = self.manifest["bytes"] / self.tokens
        self.tokenizer_folder = self.folder / TOKENIZER
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])])
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._files = OpenFiles(_OPEN_FILES)
        self._begins: dict[int, int] = {}  # shard -> where its tokens begin, in bytes
        for shard in self.manifest["shards"]:
            self._check_size(shard)

    def windows(self, length: int) -> int:
        """How many windows of `length` inputs there are: what is left over at the end is not used."""
        return max(0, self.tokens - 1) // length

    def window(self, index: int, length: int) -> np.ndarray:
        """Window `index` of the stream.

        Args:
            index: 0 or more, less than `windows(length)`.
            length: T, the inputs of a window.

        Returns:
            (T + 1,) uint16 or uint32: the tokens from `index` * T on, across the borders of shards.

        Raises:
            IndexError: if there is no such window.
            DataError: if a shard is damaged.
        """
        if not 0 <= index < self.windows(length):
            raise IndexError(f"window {index} of {length} tokens: {self.folder} has {self.windows(length)}")
        begin, end = index * length, index * length + length + 1
        tokens = np.empty(length + 1, self._dtype)
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        rest = tokens
        while begin < end:
            first, last = int(self._starts[shard]), min(end, int(self._starts[shard + 1]))
            self.read_into(rest[: last - begin], shard, begin - first)
            rest, begin, shard = rest[last - begin :], last, shard + 1
        if tokens.max() >= self.vocab_size:  # a model would fail with less to say, a GPU without a name
            raise DataError(
                f"window {index} of {length} tokens holds {tokens.max()}, but the vocabulary of {self.folder} has "
                f"{self.vocab_size}; {_remedy(self.folder)}"
            )
        return tokens

    def read_into(self, tokens: np.ndarray, shard: int, first: int) -> None:
        """Fill `tokens` (n,), of the set's dtype, from a shard's token `first` on.

        By reading, not by mapping: a file that has become shorter is an error here, and the end of the process there.

        Raises:
            DataError: if the shard cannot be read (twice) or is damaged.
        """

        def read(file: int) -> int:
            return os.preadv(file, [tokens.data], self._begins[shard] + first * tokens.itemsize)

        path = self.folder / self.manifest["shards"][shard]["name"]
        try:
            count = self._files.read(shard, lambda: self._opened(path, shard), read)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: {error}; {_remedy(self.folder)}") from error
        if count != tokens.nbytes:
            raise DataError(f"{path} has become shorter; {_remedy(self.folder)}")

    def verify(self) -> None:
        """Read all shards and compare their checksums. Raises DataError naming the first that differs."""
        for shard in self.manifest["shards"]:
            path = self.folder / shard["name"]
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise DataError(f"{path} has not the SHA-256 that {MANIFEST} lists; {_remedy(self.folder)}")

    def require_same_tokenizer(self, other: TokenShards) -> None:
        """Raise DataError unless `other` was made with the same tokenizer."""
        ours, theirs = (shards.manifest["tokenizer"] for shards in (self, other))
        if (ours["sha256"], self.end_of_text) != (theirs["sha256"], other.end_of_text):
            raise DataError(
                f"{self.folder} and {other.folder} have different tokenizers ({ours['name']}, {theirs['name']}); "
                f"make one again with --tokenizer {self.tokenizer_folder}"
            )

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["name"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; {_remedy(self.folder)}") from error
        if size != shard["bytes"]:
            raise DataError(f"{path} has {size} bytes instead of {shard['bytes']}; {_remedy(self.folder)}")

    def _opened(self, path: Path, shard: int) -> int:
        file, self._begins[shard] = open_tokens(path, self.manifest["dtype"], self.manifest["shards"][shard]["tokens"])
        return file


def open_tokens(path: Path, dtype: str, tokens: int) -> tuple[int, int]:
    """Open a shard that holds so many tokens of a type and nothing else.

    Returns:
        Its file descriptor, and where its tokens begin, in bytes.

    Raises:
        OSError, SafetensorError: if it cannot be read.
        DataError: if it holds something else.
    """
    with safe_open(path, framework="np") as content:
        tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118  (it is no dict)
        found = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    expected = {TENSOR: (_dtype_code(dtype), [tokens])}
    if found != expected:
        raise DataError(f"{path} holds {found} instead of {expected}; {_remedy(path.parent)}")
    file = open_to_read(path)
    return file, 8 + int.from_bytes(os.pread(file, 8, 0), "little")  # after the header and its length


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of token shards, its fields checked.

    Raises:
        DataError: if there is none, or it is not one of ours; the message names the field.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        _check_manifest(manifest)
    except FileNotFoundError as error:
        inside = folder / "train"
        hint = f"; did you mean {inside}?" if (inside / MANIFEST).exists() else f"; {_remedy(folder)}"
        raise DataError(f"{path} does not exist{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be used: {error}; delete {folder} and make or copy it anew") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raises ValueError naming the field that is wrong."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f'field "format" is not "{FORMAT}"')
    shards, tokenizer = manifest.get("shards"), manifest.get("tokenizer")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise ValueError('field "shards" is no list of shards')
    if not isinstance(tokenizer, dict) or not all(isinstance(tokenizer.get(key), str) for key in ("name", "sha256")):
        raise ValueError('field "tokenizer" lacks "name" or "sha256"')
    for entry in (manifest, *shards):
        for field in _COUNTS:
            if type(entry.get(field)) is not int or not 1 <= entry[field] <= _MAX_COUNT:
                raise ValueError(f'field "{field}" of {entry.get("name", "the set")} is {entry.get(field)!r}')
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]*", shard["name"] if isinstance(shard.get("name"), str) else ""):
            raise ValueError(f'field "name" is {shard.get("name")!r}, not a plain file name')
        if not re.fullmatch(r"[0-9a-f]{64}", shard["sha256"] if isinstance(shard.get("sha256"), str) else ""):
            raise ValueError(f'field "sha256" of {shard["name"]} is {shard.get("sha256")!r}')
    for field in ("tokens", "documents"):
        total = sum(shard[field] for shard in shards)
        if total != manifest[field]:
            raise ValueError(f'field "{field}" is {manifest[field]}, but its shards have {total}')
    if manifest.get("dtype") not in tuple(DTYPES):
        raise ValueError(f'field "dtype" is {manifest.get("dtype")!r}; allowed: {", ".join(DTYPES)}')
    itemsize = DTYPES[manifest["dtype"]].itemsize
    for shard in shards:
        if shard["tokens"] * itemsize > shard["bytes"]:
            raise ValueError(f'field "tokens" of {shard["name"]} is {shard["tokens"]}, too many for its "bytes"')
    vocab_size, end = manifest.get("vocab_size"), manifest.get("end_of_text")
    if type(vocab_size) is not int or type(end) is not int or not 0 <= end < vocab_size <= 256**itemsize:
        raise ValueError(f'field "end_of_text" is {end!r}, with "vocab_size" {vocab_size!r}')


def _remedy(folder: Path) -> str:
    return f"run the scripts/make_tokens.py command that made {folder} again (it keeps what is whole), or copy it anew"


def _dtype_code(name: str) -> str:
    """A dtype as safetensors writes it: "uint16" -> "U16"."""
    return name.replace("uint", "U")


class TokenWindows(Dataset[TokenBatch]):
    """Windows of T + 1 tokens by their numbers."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        self.shards = shards
        self.length = length

    def __getitems__(self, windows: list[int]) -> TokenBatch:
        """The batch of these windows."""
        tokens = np.empty((len(windows), self.length + 1), np.int64)
        for row, window in zip(tokens, windows, strict=True):
            row[:] = self.shards.window(window, self.length)
        return TokenBatch(torch.from_numpy(tokens), tuple(windows))


class ShuffledWindows(Sampler[list[int]]):
    """(epoch, position) lists -> window numbers; every epoch is a permutation of its own of all windows.

    Args:
        windows: how many there are.
        seed: of the order; 0 or more.
        batches: the lists.
    """

    def __init__(self, windows: int, seed: int, batches: StepBatches) -> None:
        self.windows = windows
        self.key = philox_key(seed, ORDER)
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        current, order = -1, np.empty(0, np.int64)
        for batch in self.batches:
            epoch = batch[0][0]  # of the whole batch: no step crosses an epoch's end
            if epoch != current:
                current, order = epoch, generator(self.key, epoch, 0).permutation(self.windows)
            yield [int(order[position]) for _, position in batch]


def train_loader(
    shards: TokenShards,
    config: TokenDataConfig,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_steps: int,
) -> DataLoader[TokenBatch]:
    """One rank's micro-batches of the steps start_step .. num_steps - 1, in order: `TokenBatch`, B = micro_batch.

    An epoch shows every window at most once, in an order of its own, and drops the last partial global batch.
    Beginning at a step is a seek.

    Args:
        shards: the training tokens.
        config: sequence length, workers.
        seed: of the order; 0 or more.
        global_batch: windows of a step, over all ranks and micro-batches.
        micro_batch: windows of one forward on one rank.
        rank: of this process.
        world_size: number of ranks.
        start_step: first step, counted from 0 over all epochs.
        num_steps: the step to stop before.

    Raises:
        ValueError: if the batch does not split into micro-batches, or an epoch is shorter than a batch.
    """
    windows = shards.windows(config.sequence_length)
    if windows < global_batch:
        raise ValueError(
            f"data.train has {shards.tokens:,} tokens, {windows} windows of data.sequence_length = "
            f"{config.sequence_length}, fewer than one global batch of {global_batch}; use a smaller batch or "
            "shorter sequences"
        )
    steps = range(start_step, num_steps)
    batches = StepBatches(windows, global_batch, micro_batch, rank, world_size, steps)
    order = ShuffledWindows(windows, seed, batches)
    return batch_loader(TokenWindows(shards, config.sequence_length), order, config.workers)


def val_loader(
    shards: TokenShards,
    config: TokenDataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader[TokenBatch]:
    """One rank's share of the first held-out windows, in order, each exactly once over all ranks, as `TokenBatch`.

    The last batch may be smaller, and ranks may differ by one window: add up sums and counts, not means of batches.
    May be iterated again and again.

    Args:
        shards: the held-out tokens.
        config: sequence length, workers.
        batch_size: windows of a batch on one rank.
        rank: of this process.
        world_size: number of ranks.
        limit: use the first so many windows; None: all.
    """
    windows = shards.windows(config.sequence_length)
    mine = range(rank, windows if limit is None else min(limit, windows), world_size)
    batches = [list(mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
    return batch_loader(TokenWindows(shards, config.sequence_length), batches, config.workers)
