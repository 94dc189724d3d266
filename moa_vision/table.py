"""The samples of a tar as rows (offset, size, label, key) of a few arrays, read from its headers."""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from webdataset.tariterators import base_plus_ext

from moa_train.errors import DataError
from moa_vision.images import ImageError

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "tif", "tiff", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "npy"),
)

_COLUMNS = {
    "offsets": np.int64,
    "sizes": np.int64,
    "labels": np.int32,
    "key_ends": np.int64,
    "key_bytes": np.uint8,
}

_IMAGE_FIELDS = (*IMAGE_EXTENSIONS, "img", "image")  # of members that are images by their names
_LISTED = 8  # fields that a message names
_CHOOSE = "choose one with data.image_key (--image-key)"

Member = tuple[int, int]  # offset and size in bytes


class BadSample(NamedTuple):
    """A sample that could not be used: its shard, its key and what is wrong with it."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Rows for N samples, arrays only, so that workers get them by shared memory.

    Attributes:
        offsets: (N,) int64, where the encoded image begins in its shard, in bytes.
        sizes: (N,) int64, its length in bytes.
        labels: (N,) int32, -1 where there is none.
        key_ends: (N,) int64, where each key ends in `key_bytes`.
        key_bytes: (K,) uint8, the keys, UTF-8, end to end.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    key_ends: np.ndarray
    key_bytes: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[str, int, int, int]]) -> "SampleTable":
        """From rows of key, offset, size and label."""
        keys = [row[0].encode(errors="replace") for row in rows]
        numbers = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 3)
        return cls(
            np.ascontiguousarray(numbers[:, 0]),
            np.ascontiguousarray(numbers[:, 1]),
            numbers[:, 2].astype(np.int32),
            np.cumsum([len(key) for key in keys], dtype=np.int64),
            np.frombuffer(b"".join(keys), np.uint8).copy(),
        )

    @classmethod
    def concatenate(cls, tables: Sequence["SampleTable"]) -> "SampleTable":
        """The rows of all `tables`, in order."""
        shifts = np.cumsum([0] + [len(table.key_bytes) for table in tables])
        ends = [table.key_ends + shift for table, shift in zip(tables, shifts[:-1], strict=True)]
        joined = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS}
        return cls(**{**joined, "key_ends": np.concatenate(ends)})

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        """The key of a sample: its member's name up to the first dot."""
        start = self.key_ends[sample - 1] if sample else 0
        return self.key_bytes[start : self.key_ends[sample]].tobytes().decode(errors="replace")

    def to_bytes(self, problems: Iterable[BadSample] = ()) -> bytes:
        """As a safetensors file; the same rows give the same bytes."""
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        arrays["problems"] = np.frombuffer(json.dumps(list(problems)).encode(), np.uint8)
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple["SampleTable", list[BadSample]]:
        """The inverse of `to_bytes`. Raises ValueError if `data` is not such a file."""
        try:
            arrays = safetensors.numpy.load(data)
            rows = json.loads(arrays["problems"].tobytes())
            problems = [BadSample(*map(str, row)) for row in rows]
            table = cls(*(arrays[name].astype(dtype, casting="no") for name, dtype in _COLUMNS.items()))
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"no sample table: {error}") from error
        if any(getattr(table, name).ndim != 1 for name in _COLUMNS):
            raise ValueError("no sample table: a column is no list of numbers")
        ends = np.concatenate([[0], table.key_ends])
        if not (table.offsets.shape == table.sizes.shape == table.labels.shape == table.key_ends.shape):
            raise ValueError("no sample table: its columns differ in length")
        if (
            (np.diff(ends) < 0).any()
            or ends[-1] != len(table.key_bytes)
            or (table.sizes < 0).any()
            or (table.offsets < 0).any()
        ):
            raise ValueError("no sample table: negative lengths")
        return table, problems

    def __getstate__(self) -> dict[str, torch.Tensor]:
        # kept: a process that is not forked takes over the tensors' shared memory only after this has returned
        if "_shared" not in self.__dict__:
            self.__dict__["_shared"] = {name: torch.from_numpy(getattr(self, name)) for name in _COLUMNS}
        return self.__dict__["_shared"]

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.__dict__.update({name: column.numpy() for name, column in state.items()})


def scan_tar(path: Path, shard: str | None = None) -> tuple[dict[str, dict[str, Member]], list[BadSample]]:
    """Lists the members of a plain tar by sample: {key: {extension: (offset, size)}}, in the order of the tar.

    Only headers are read. Members of a key need not be neighbours; of two with the same key and extension the
    first counts, and the other is reported: an image under its member's name and number, "a.jpg (2)", which is no
    key, as those have no dot there. So is a tar without the zeros that end one, under the key "(end)": it may be cut
    between two members, or be by a writer that leaves them out.

    Raises:
        DataError: if the file is no tar, is truncated or has a damaged header.
    """
    shard = shard or str(path)
    samples: dict[str, dict[str, Member]] = {}
    problems = []
    again: Counter[tuple[str, str]] = Counter()
    try:
        for member in _members(path, shard):
            name = member.name.encode(errors="replace").decode()  # names of tars need not be UTF-8
            key, extension = base_plus_ext(name)
            if member.isdir() or key is None or extension is None or re.match(r"__[^/]*__($|/)", name):
                continue
            extension = extension.lower()
            found = samples.setdefault(key, {})
            if not member.isreg() or member.issparse():
                problems.append(BadSample(shard, key, f"{name} is no plain file; it is left out"))
            elif extension in found:
                again[key, extension] += 1
                lost = f"{name} ({again[key, extension] + 1})" if _is_image(extension) else key
                problems.append(BadSample(shard, lost, f"{name} occurs twice; the first is used"))
            else:
                found[extension] = (member.offset_data, member.size)
        if samples and _lacks_end(path):
            problems.append(BadSample(shard, "(end)", "it does not end as tars do: samples may have been cut off"))
    except DataError:
        raise
    except Exception as error:  # besides its own errors tarfile has OverflowError, MemoryError, RecursionError, ...
        raise DataError(f"cannot read shard {shard}: {error or type(error).__name__}") from error
    return samples, problems


def _members(path: Path, shard: str) -> Iterator[tarfile.TarInfo]:
    """The members of a plain tar, in order. Raises DataError, and what tarfile raises."""
    end = path.stat().st_size
    position = -1
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset <= position:  # some versions of tarfile go round in circles
                raise DataError(f"shard {shard} is damaged at byte {member.offset}: fetch or make it again")
            if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                raise DataError(f"shard {shard} is truncated inside {member.name}: fetch or make it again")
            position = member.offset
            yield member
        stopped = tar.offset
    with path.open("rb") as file:  # tarfile takes a damaged header for the end
        file.seek(stopped)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise DataError(f"shard {shard} is damaged at byte {stopped}: fetch or make it again")


def _lacks_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
        return bool(file.read().strip(b"\0"))


def image_member(members: Mapping[str, Member], image_key: str | None = None) -> Member:
    """The member that is a sample's image.

    Args:
        members: of the sample, by field: KEY.input.jpg has the field input.jpg.
        image_key: its field; of several, separated by ";", the first that the sample has. None: a plain image suffix
            (jpg before png, and so on), or else the only field that ends in one, as input.jpg does.

    Raises:
        ImageError: if there is none, or more than one; the message lists the fields that there are.
    """
    if image_key is not None:
        wanted = [field.strip(" .").lower() for field in image_key.split(";")]
        missing = f"no {' or '.join(wanted)}"
    else:
        images = [*filter(_is_image, members)]
        images = [field for field in images if not field.endswith("npy")] or images  # arrays beside it are features
        wanted = [field for field in _IMAGE_FIELDS if field in images] or images
        missing = "no image"
        if wanted and wanted[0] not in _IMAGE_FIELDS and len(wanted) > 1:
            raise ImageError(f"several images ({_some(wanted)}); {_CHOOSE}")
    found = next((members[field] for field in wanted if field in members), None)
    if found is None:
        raise ImageError(f"{missing} among its members ({_some(members) or 'none'}); {_CHOOSE}")
    return found


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGE_FIELDS


def _some(fields: Iterable[str]) -> str:
    names = [*fields]
    return ", ".join(names[:_LISTED] + ["..."] * (len(names) > _LISTED))


def index_tar(
    path: Path, shard: str | None = None, image_key: str | None = None
) -> tuple[SampleTable, list[BadSample]]:
    """The rows of a plain tar's samples, and what is wrong with some; `image_key` as in `image_member`.

    Raises DataError as `scan_tar` does.
    """
    shard = shard or str(path)
    samples, problems = scan_tar(path, shard)
    rows = []
    with path.open("rb") as file:
        for key, members in samples.items():
            try:
                image = image_member(members, image_key)
            except ImageError as error:
                problems.append(BadSample(shard, key, str(error)))
                continue
            label = -1
            if "cls" in members:
                file.seek(members["cls"][0])
                text = file.read(min(members["cls"][1], 32))
                if re.fullmatch(rb"\s*\d{1,9}\s*", text):
                    label = int(text)
                else:
                    problems.append(BadSample(shard, key, f"no label: its .cls is no whole number ({text!r})"))
            rows.append((key, *image, label))
    return SampleTable.from_rows(rows), problems
