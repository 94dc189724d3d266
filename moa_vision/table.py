"""The samples of a tar as rows (offset, size, label, key) of a few arrays, read from its headers."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from moa_train.errors import DataError
from moa_vision.images import ImageError

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "tif", "tiff", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "npy"),
)

_COLUMNS = {"offsets": np.int64, "sizes": np.int64, "labels": np.int32, "key_ends": np.int64, "key_bytes": np.uint8}
_IMAGE_FIELDS = (*IMAGE_EXTENSIONS, "img", "image")
_CHOOSE = "choose one with data.image_key (--image-key)"

Member = tuple[int, int]
"""Offset and size of a member in bytes."""


class BadSample(NamedTuple):
    """An unusable sample: URL or path of its shard, its key, and the reason."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Rows of N samples as arrays, which forked data loader workers share.

    Attributes:
        offsets: (N,) int64, position of the encoded image in its shard, in bytes.
        sizes: (N,) int64, length of the encoded image in bytes.
        labels: (N,) int32, -1 for none.
        key_ends: (N,) int64, end of each key in `key_bytes`.
        key_bytes: (K,) uint8, the concatenated keys in UTF-8.
        problems: Problems found while the tars were indexed; samples without an image have no row.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    key_ends: np.ndarray
    key_bytes: np.ndarray
    problems: tuple[BadSample, ...] = ()

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[str, int, int, int]], problems: Sequence[BadSample] = ()) -> SampleTable:
        """Build a table from rows of key, offset, size and label."""
        keys = [row[0].encode(errors="replace") for row in rows]
        numbers = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 3)
        return cls(
            offsets=np.ascontiguousarray(numbers[:, 0]),
            sizes=np.ascontiguousarray(numbers[:, 1]),
            labels=numbers[:, 2].astype(np.int32),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            key_bytes=np.frombuffer(b"".join(keys), np.uint8).copy(),
            problems=tuple(problems),
        )

    @classmethod
    def concatenate(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """Return the rows of all tables in order."""
        shifts = np.cumsum([0] + [len(table.key_bytes) for table in tables])
        ends = [table.key_ends + shift for table, shift in zip(tables, shifts[:-1], strict=True)]
        joined = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS}
        problems = tuple(problem for table in tables for problem in table.problems)
        return cls(**{**joined, "key_ends": np.concatenate(ends)}, problems=problems)

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        """Return the key of a sample: its member's path up to the first dot of the name."""
        start = self.key_ends[sample - 1] if sample else 0
        return self.key_bytes[start : self.key_ends[sample]].tobytes().decode(errors="replace")

    def rows(self, first: int, last: int) -> dict[str, tuple[int, int, int]]:
        """Return offset, size and label of samples first .. last - 1 by key."""
        columns = (column[first:last].tolist() for column in (self.offsets, self.sizes, self.labels))
        return dict(zip(map(self.key, range(first, last)), zip(*columns, strict=True), strict=True))

    def to_bytes(self) -> bytes:
        """Return the table as a safetensors file; equal tables give equal bytes."""
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        arrays["problems"] = np.frombuffer(json.dumps(self.problems).encode(), np.uint8)
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> SampleTable:
        """Parse the result of `to_bytes`. Raises DataError for anything else."""
        try:
            arrays = safetensors.numpy.load(data)
            problems = tuple(BadSample(*map(str, row)) for row in json.loads(arrays["problems"].tobytes()))
            columns = {name: arrays[name].astype(dtype, casting="no") for name, dtype in _COLUMNS.items()}
            table = cls(**columns, problems=problems)
        except Exception as error:  # safetensors raises many types
            raise DataError(f"not a sample table: {type(error).__name__}: {error}") from error
        rows = {column.shape for column in (table.offsets, table.sizes, table.labels, table.key_ends)}
        ends = np.append(0, table.key_ends)
        negative = any((numbers < 0).any() for numbers in (np.diff(ends), table.sizes, table.offsets))
        if rows != {(len(table),)} or negative or ends[-1] != table.key_bytes.size:
            raise DataError("not a sample table: its columns do not fit together")
        return table


def scan_tar(path: Path, shard: str | None = None) -> tuple[dict[str, dict[str, Member]], list[BadSample]]:
    """List the members of a plain tar by sample, from its headers; `shard` is its name in messages.

    Of several members with the same key and extension the first counts. A duplicate image is reported under its name
    and position, because it is a lost sample. A tar without an end marker may have been cut between two members and is
    reported under the key "(end)".

    Returns:
        {key: {extension: (offset, size)}} in the order of the tar, and the problems found.

    Raises:
        DataError: The file is not a tar, is truncated, or has a damaged header.
    """
    from webdataset.tariterators import base_plus_ext  # late: training steps need no webdataset

    shard = shard or str(path)
    samples: dict[str, dict[str, Member]] = {}
    problems = []
    for member in _members(path, shard):
        name = member.name.encode(errors="replace").decode()  # tar names need not be UTF-8
        key, extension = base_plus_ext(name)
        if member.isdir() or key is None or extension is None or re.match(r"__[^/]*__($|/)", name):
            continue
        extension = extension.lower()
        fields = samples.setdefault(key, {})
        if not member.isreg() or member.issparse():
            problems.append(BadSample(shard, key, f"{name} is not a regular file and is ignored"))
        elif extension in fields:
            lost = f"{name} at byte {member.offset}" if _is_image(extension) else key
            problems.append(BadSample(shard, lost, f"{name} occurs more than once; the first is used"))
        else:
            fields[extension] = (member.offset_data, member.size)
    if samples and not _has_end_marker(path):
        problems.append(BadSample(shard, "(end)", "the tar has no end marker; samples may have been cut off"))
    return samples, problems


def _members(path: Path, shard: str) -> Iterator[tarfile.TarInfo]:
    end = path.stat().st_size
    position = -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset <= position:  # tarfile may loop on such headers
                    raise DataError(f"damaged at byte {member.offset}")
                if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                    raise DataError(f"truncated inside {member.name}")
                position = member.offset
                yield member
            stopped = tar.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(stopped)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise DataError(f"damaged at byte {stopped}")
    except Exception as error:  # tarfile also raises OverflowError, MemoryError, ...
        raise DataError(f"cannot read shard {shard}: {error or type(error).__name__}") from error


def _has_end_marker(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
        return not file.read().strip(b"\0")


def image_member(members: Mapping[str, Member], image_key: str | None = None) -> Member:
    """Return the member that is a sample's image.

    Args:
        members: Members of the sample by field; KEY.input.jpg has the field input.jpg.
        image_key: Field of the image, or several in order of preference, separated by ";". None: a plain image suffix
            (jpg before png, and so on), or else the only field that ends in one, such as input.jpg.

    Raises:
        ImageError: There is none, or more than one; the message lists the fields.
    """
    if image_key is not None:
        wanted = [field.strip(" .").lower() for field in image_key.split(";")]
    else:
        images = [*filter(_is_image, members)]
        images = [field for field in images if not field.endswith("npy")] or images  # arrays next to it are features
        wanted = [field for field in _IMAGE_FIELDS if field in images] or images
        if wanted and wanted[0] not in _IMAGE_FIELDS and len(wanted) > 1:
            raise ImageError(f"several images ({', '.join(wanted)}); {_CHOOSE}")
    for field in wanted:
        if field in members:
            return members[field]
    missing = "image" if image_key is None else " or ".join(wanted)
    raise ImageError(f"no {missing} among its members ({', '.join(members) or 'none'}); {_CHOOSE}")


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGE_FIELDS


def index_tar(path: Path, shard: str | None = None, image_key: str | None = None) -> SampleTable:
    """Return the table of a plain tar's samples; arguments and errors as `scan_tar` and `image_member`."""
    shard = shard or str(path)
    samples, problems = scan_tar(path, shard)
    rows = []
    with path.open("rb") as file:
        for key, members in samples.items():
            try:
                offset, size = image_member(members, image_key)
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
                    problems.append(BadSample(shard, key, f"no label: its .cls is not a whole number ({text!r})"))
            rows.append((key, offset, size, label))
    return SampleTable.from_rows(rows, problems)
