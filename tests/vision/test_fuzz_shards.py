"""Malformed tars, manifests and indices: every reader returns a result or raises DataError."""

from __future__ import annotations

import io
import struct
import tarfile

import pytest

from moa_train.errors import DataError
from moa_vision.images import ImageError
from moa_vision.index import ShardReader, open_index
from moa_vision.shards import make_shards
from moa_vision.sources import TarSource
from moa_vision.table import BadSample, SampleTable, index_tar


def tar(*members, form=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for member in members:
            name, data, kind, link = (*member, *(tarfile.REGTYPE, "")[len(member) - 2 :])
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LONG_NAMES = [(f"{'d/' * 80}{'n' * 120}{i}.jpg", b"image") for i in range(2)]
TARS = {
    "gnu": tar(("a.jpg", b"image"), ("a.cls", b"1"), ("a.json", b"{}"), *LONG_NAMES),
    "pax": tar(("ä" * 150 + ".jpg", b"image"), ("b.png", b"x"), *LONG_NAMES, form=tarfile.PAX_FORMAT),
    "links": tar(("a.jpg", b"image"), ("b.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"),
                 ("c.jpg", b"", tarfile.LNKTYPE, "a.jpg"), ("d.jpg", b"", tarfile.CHRTYPE),
                 ("e.jpg", b"", tarfile.FIFOTYPE)),
}  # fmt: skip


def read_tar(path):
    """Read a tar by every reader, as far as it goes."""
    try:
        table = index_tar(path)
        source = TarSource(str(path), path.parent / "cache")
        index = open_index(str(path), path.parent / "cache")
    except DataError as error:
        assert str(path) in str(error)
        return
    reader = ShardReader(index)
    for sample in range(len(table)):
        assert len(reader.read(sample)) == table.sizes[sample]
    for item in source.items:
        try:
            source.read(item)
        except ImageError:
            continue


@pytest.mark.parametrize("kind", TARS)
def test_damaged_tars(fuzz, fuzzing, kind, tmp_path):
    path = tmp_path / "x.tar"

    def attempt(data):
        path.write_bytes(data)
        read_tar(path)

    fuzz(fuzzing.damaged(TARS[kind]), attempt, examples=50)


def header(name, *, size=b"00000000005\0", kind=b"0"):
    """Return a tar header with any bytes as size and the right checksum."""
    block = bytearray(struct.pack("100s8s8s8s12s12s8sc100s8s247x", name, b"0", b"0", b"0", size, b"0", b" " * 8, kind,
                                  b"", b"ustar  \0"))  # fmt: skip
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_tar_headers_with_impossible_sizes(tmp_path):
    huge = b"\x80" + (2**70).to_bytes(11, "big")
    negative = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    beyond = b"\x80" + (2**62).to_bytes(11, "big")
    for size in (huge, negative, beyond, b"77777777777\0", b"zzzz\0"):
        for kind in b"0SKLxg57":
            content = header(b"a.jpg", size=size, kind=bytes([kind])) + b"image" + bytes(507) + bytes(1024)
            (tmp_path / "x.tar").write_bytes(header(b"ok.jpg") + b"image" + bytes(507) + content)
            read_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes((header(b"l", kind=b"L") + b"name" + bytes(508)) * 5000)
    read_tar(tmp_path / "x.tar")


def test_damaged_manifests(fuzz, fuzzing, shards, tmp_path):
    make_shards(str(shards), tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"

    def attempt(content):
        path.write_bytes(content)
        error = fuzzing.refusal(lambda: open_index(str(path.parent), tmp_path / "cache"), DataError)
        assert error is None or str(path.parent) in str(error)

    fuzz(fuzzing.json_file(path.read_bytes()), attempt, examples=100)


def test_damaged_indices(fuzz, fuzzing):
    rows = [(f"k{i}", 512 * i, 100, i) for i in range(5)]

    def attempt(data):
        try:
            table = SampleTable.from_bytes(data)
        except DataError as error:
            assert "not a sample table" in str(error)
        else:
            assert all(isinstance(table.key(sample), str) for sample in range(len(table)))
            assert all(isinstance(problem, BadSample) for problem in table.problems)

    good = SampleTable.from_rows(rows, [BadSample("s", "k", "r")]).to_bytes()
    fuzz(fuzzing.tensors_file(good) | fuzzing.damaged(good), attempt, examples=100)
