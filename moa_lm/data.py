"""Token shards -> batches (B, T + 1) of tokens in an order that is a function of (seed, epoch, position).

A data set is one stream of tokens in which every document ends with end-of-text. Sample i is the window of T + 1
tokens that begins at token i T: the first T are the inputs, the last T their labels. `moa_lm.token_shards` writes
such sets.
"""

from __future__ import annotations

import os
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
from moa_train.errors import ConfigError, DataError, require
from moa_train.manifest import MANIFEST, parse_manifest
from moa_train.open_files import OpenFiles, open_to_read

FORMAT = "moa-tokens-1"

COUNTS = ("tokens", "documents")
"""Counts that a manifest has for every shard and for the whole set."""

TOKENIZER = "tokenizer"
"""Name of the tokenizer's folder in a data set."""

TENSOR = "tokens"
"""Name of the only tensor of a shard."""

DTYPES = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}

_SAFETENSORS_DTYPES = {"uint16": "U16", "uint32": "U32"}
_MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class TokenDataConfig:
    """Token shards and how they become batches.

    Args:
        train: Folder of training shards, made by scripts/make_tokens.py.
        val: Folder of held-out shards with the same tokenizer; null disables validation.
        sequence_length: Input tokens per sample; a sample has one more.
        document_mask: Restrict attention and labels to the token's own document. The loss of a step is the mean over
            the labels of its global batch, which are slightly fewer than its tokens.
        workers: Loader processes per device; 0 reads in the training process, which is fast enough on a local disk.
    """

    train: str
    val: str | None = None
    sequence_length: int = 1024
    document_mask: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Check the ranges. Raises ConfigError."""
        require("data.sequence_length", self.sequence_length, self.sequence_length >= 1, "1 or above")
        require("data.workers", self.workers, self.workers >= 0, "0 or above")


class TokenBatch(NamedTuple):
    """B windows of the token stream.

    Attributes:
        tokens: (B, T + 1) int64; the first T are inputs, the last T labels.
        windows: The B window numbers; window w begins at token w T of the stream.
    """

    tokens: Tensor
    windows: tuple[int, ...] = ()


class TokenShards:
    """A folder of token shards with a valid manifest; a shard is opened on its first read.

    Args:
        folder: Folder with manifest.json, shard-*.safetensors and tokenizer/.

    Attributes:
        folder: The folder as a path.
        manifest: Content of manifest.json.
        tokens: Tokens of the whole stream, end-of-text included.
        documents: Documents of the whole stream.
        vocab_size: Number of the tokenizer's tokens.
        end_of_text: Token after every document.
        bytes_per_token: UTF-8 bytes of the texts per token.
        tokenizer_folder: Folder that AutoTokenizer loads.

    Raises:
        DataError: The manifest or a shard is missing or invalid.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))  # noqa: PTH111  (Path.expanduser fails for unknown users)
        self.manifest = read_manifest(self.folder)
        self.tokens: int = self.manifest["tokens"]
        self.documents: int = self.manifest["documents"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end_of_text: int = self.manifest["end_of_text"]
        self.bytes_per_token = self.manifest["bytes"] / self.tokens
        self.tokenizer_folder = self.folder / TOKENIZER
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])])
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._files = OpenFiles(_MAX_OPEN_FILES)
        self._offsets: dict[int, int] = {}  # shard -> byte at which its tokens begin
        for shard in self.manifest["shards"]:
            self._check_size(shard)

    def windows(self, length: int) -> int:
        """Return the number of windows of `length` inputs; the rest of the stream is unused."""
        return max(0, self.tokens - 1) // length

    def window(self, index: int, length: int) -> np.ndarray:
        """Return window `index` of the stream, which may cross shard borders.

        Args:
            index: Number of the window, from 0 to `windows(length)` - 1.
            length: T, the inputs of a window.

        Returns:
            (T + 1,) uint16 or uint32: the tokens from `index` * T on.

        Raises:
            IndexError: The index is out of range.
            DataError: A shard is damaged.
        """
        if not 0 <= index < self.windows(length):
            raise IndexError(f"window {index} of {length} tokens: {self.folder} has {self.windows(length)}")
        begin, end = index * length, index * length + length + 1
        tokens = np.empty(length + 1, self._dtype)
        rest, shard = tokens, int(np.searchsorted(self._starts, begin, side="right")) - 1
        while begin < end:
            first, last = int(self._starts[shard]), min(end, int(self._starts[shard + 1]))
            self.read_into(rest[: last - begin], shard, begin - first)
            rest, begin, shard = rest[last - begin :], last, shard + 1
        if tokens.max() >= self.vocab_size:  # the embedding's own error on a GPU names neither token nor file
            raise DataError(
                f"window {index} of {length} tokens holds token {tokens.max()}, but the vocabulary of {self.folder} "
                f"has {self.vocab_size} tokens; {_remedy(self.folder)}"
            )
        return tokens

    def read_into(self, tokens: np.ndarray, shard: int, first: int) -> None:
        """Fill `tokens` (n,) of the set's dtype with the tokens of a shard from `first` on. Raises DataError.

        Files are read rather than memory-mapped: a truncated file or a failing network file system raises an error
        here, where a map would kill the process.
        """

        def read(file: int) -> int:
            return os.preadv(file, [tokens.data], self._offsets[shard] + first * tokens.itemsize)

        path = self.folder / self.manifest["shards"][shard]["name"]
        try:
            count = self._files.read(shard, lambda: self._open(path, shard), read)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: {error}; {_remedy(self.folder)}") from error
        if count != tokens.nbytes:
            raise DataError(f"{path} was truncated; {_remedy(self.folder)}")

    def require_same_tokenizer(self, other: TokenShards) -> None:
        """Raise DataError unless `other` has the same tokenizer."""
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

    def _open(self, path: Path, shard: int) -> int:
        file, self._offsets[shard] = open_tokens(path, self.manifest["dtype"], self.manifest["shards"][shard]["tokens"])
        return file


def open_tokens(path: Path, dtype: str, tokens: int) -> tuple[int, int]:
    """Open a shard that must hold `tokens` tokens of one dtype and nothing else.

    Returns:
        The file descriptor, and the byte at which the tokens begin.

    Raises:
        OSError, SafetensorError: The file cannot be read.
        DataError: The file holds something else.
    """
    with safe_open(path, framework="np") as content:
        tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        found = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    expected = {TENSOR: (_SAFETENSORS_DTYPES[dtype], [tokens])}
    if found != expected:
        raise DataError(f"{path} holds {found} instead of {expected}; {_remedy(path.parent)}")
    file = open_to_read(path)
    return file, 8 + int.from_bytes(os.pread(file, 8, 0), "little")  # after the header and its length


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the validated manifest of a folder of token shards. Raises DataError naming the file and the field."""
    path = folder / MANIFEST
    if not path.exists():
        nested = folder / "train"
        pack = "pack it with scripts/make_tokens.py, or the demo's data with python -m moa_lm tales"
        remedy = f"did you mean {nested}?" if (nested / MANIFEST).exists() else pack
        raise DataError(f"{path} does not exist; {remedy}")
    try:
        manifest = parse_manifest(path.read_bytes(), FORMAT, COUNTS)
        _check_fields(manifest)
    except (OSError, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete {folder} and make or copy it again") from error
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raise DataError naming a field of a token manifest that is missing or invalid."""
    dtype, vocab_size, end = (manifest.get(field) for field in ("dtype", "vocab_size", "end_of_text"))
    if dtype not in tuple(DTYPES):
        raise DataError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    if type(vocab_size) is not int or type(end) is not int or not 0 <= end < vocab_size:
        raise DataError(f"end_of_text is {end!r}, expected a token of the vocabulary of {vocab_size!r}")
    tokenizer = manifest.get("tokenizer")
    if not isinstance(tokenizer, dict) or not all(isinstance(tokenizer.get(key), str) for key in ("name", "sha256")):
        raise DataError(f"tokenizer is {tokenizer!r}, expected a name and a sha256")
    for field in ("tokens", "bytes"):
        if type(manifest.get(field)) is not int or manifest[field] < 1:
            raise DataError(f"{field} is {manifest.get(field)!r}, expected 1 or more")


def _remedy(folder: Path) -> str:
    return f"run the scripts/make_tokens.py command of {folder} again (it keeps intact shards) or copy the folder again"


class TokenWindows(Dataset[TokenBatch]):
    """Batches of windows of T + 1 tokens, by window number."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        self.shards = shards
        self.length = length

    def __getitems__(self, windows: list[int]) -> TokenBatch:
        """Return the batch of these windows."""
        tokens = np.empty((len(windows), self.length + 1), np.int64)
        for row, window in zip(tokens, windows, strict=True):
            row[:] = self.shards.window(window, self.length)
        return TokenBatch(torch.from_numpy(tokens), tuple(windows))


class ShuffledWindows(Sampler[list[int]]):
    """Batches of window numbers; every epoch is another permutation of all windows."""

    def __init__(self, windows: int, seed: int, batches: StepBatches) -> None:
        self.windows = windows
        self.key = philox_key(seed, ORDER)
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        current, order = -1, np.empty(0, np.int64)
        for batch in self.batches:
            epoch = batch[0][0]  # the same in the whole batch: no step crosses the end of an epoch
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
    """Return a loader of one rank's micro-batches of steps start_step .. num_steps - 1, as `TokenBatch`.

    Batches are counted in windows, steps from 0 over all epochs. An epoch shows every window at most once, in its own
    order, and drops the last partial global batch. Starting at a later step is a seek.

    Raises:
        ValueError: The batch does not split into micro-batches.
        ConfigError: An epoch is shorter than a global batch.
    """
    windows = shards.windows(config.sequence_length)
    if windows < global_batch:
        raise ConfigError(
            f"data.train has {shards.tokens:,} tokens, {windows} windows of data.sequence_length "
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
    """Return a loader of one rank's part of the held-out windows, in order, each once over all ranks.

    Only the first `limit` windows are used, if set. The last batch may be smaller, and ranks may differ by one window:
    add up sums and counts, not means of batches. The loader can be iterated repeatedly.
    """
    windows = shards.windows(config.sequence_length)
    mine = range(rank, windows if limit is None else min(limit, windows), world_size)
    batches = [list(mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
    return batch_loader(TokenWindows(shards, config.sequence_length), batches, config.workers)
