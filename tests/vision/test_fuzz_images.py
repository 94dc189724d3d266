"""Malformed tars, images, manifests and indices: every reader ends in our error or a result."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moa_train.errors import DataError
from moa_vision import images
from moa_vision.images import ImageError, decode_image
from moa_vision.index import ShardReader, open_index, parse_manifest
from moa_vision.shards import make_shards
from moa_vision.sources import TarSource
from moa_vision.table import BadSample, SampleTable, index_tar, scan_tar

# PIL warns of much that is odd in an image
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning:PIL")

FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
LONG = [pytest.param(150, id="short"), pytest.param(5000, id="long", marks=pytest.mark.slow)]


def array(data):
    return np.frombuffer(bytearray(data), np.uint8)


def mutations(data):
    """`data` with a few bytes changed, a piece cut out or the end cut off."""
    edits = st.lists(st.tuples(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=12)), max_size=6)
    cuts = st.tuples(st.integers(0, len(data)), st.integers(0, 600))

    def mutated(edits, cut, end):
        changed = bytearray(data)
        for at, new in edits:
            changed[at : at + len(new)] = new
        if cut is not None:
            del changed[cut[0] : cut[0] + cut[1]]
        return bytes(changed[:end])

    return st.builds(mutated, edits, st.none() | cuts, st.none() | st.integers(0, len(data)))


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
    """All that reads a tar, as far as it goes."""
    try:
        table, problems = index_tar(path)
        source = TarSource(str(path), path.parent / "cache")
        index = open_index(str(path), path.parent / "cache")
    except DataError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(problem, BadSample) for problem in problems)
    reader = ShardReader(index)
    for sample in range(len(table)):
        assert len(reader.read(sample)) == table.sizes[sample]
    for item in source.items:
        try:
            source.read(item)
        except ImageError:
            continue


@pytest.mark.parametrize("examples", LONG)
@pytest.mark.parametrize("kind", TARS)
def test_tars(kind, examples, tmp_path):
    path = tmp_path / "x.tar"

    @settings(max_examples=examples // 3, **FUZZ)
    @given(mutations(TARS[kind]))
    def check(data):
        path.write_bytes(data)
        read_tar(path)

    check()


def header(name, *, size=b"00000000005\0", kind=b"0"):
    """A tar header whose size is any bytes, with the right checksum."""
    block = bytearray(struct.pack("100s8s8s8s12s12s8sc100s8s247x", name, b"0", b"0", b"0", size, b"0", b" " * 8, kind,
                                  b"", b"ustar  \0"))  # fmt: skip
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_headers_that_lie(tmp_path):
    """Sizes below zero or beyond any file, chains of long names, sparse members."""
    huge = b"\x80" + (2**70).to_bytes(11, "big")
    negative = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    beyond = b"\x80" + (2**62).to_bytes(11, "big")
    for size in (huge, negative, beyond, b"77777777777\0", b"\xff" * 12, b"zzzz\0"):
        for kind in b"0SKLxg57":
            content = header(b"a.jpg", size=size, kind=bytes([kind])) + b"image" + bytes(507) + bytes(1024)
            (tmp_path / "x.tar").write_bytes(header(b"ok.jpg") + b"image" + bytes(507) + content)
            read_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes((header(b"l", kind=b"L") + b"name" + bytes(508)) * 5000)
    read_tar(tmp_path / "x.tar")


def test_members_are_never_written_anywhere(tmp_path, monkeypatch):
    """Names that climb, absolute names and links: read as samples, or left out and named; no file appears."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(outside)
    climbing = ("../../x.jpg", f"{outside}/absolute.jpg", "/y.jpg", "..\\z.jpg")
    path = tmp_path / "in" / "x.tar"
    path.write_bytes(tar(*((name, b"image") for name in climbing),
                         ("l.jpg", b"", tarfile.SYMTYPE, f"{outside}/target"), ("l.jpg", b"image"),
                             ("h.jpg", b"", tarfile.LNKTYPE, "../../x.jpg")))  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    samples, problems = scan_tar(path)
    assert sum("jpg" in members for members in samples.values()) == 4  # webdataset takes ..\\z.jpg for hidden
    assert [problem.reason for problem in problems] == [
        f"{name} is no plain file; it is left out" for name in ("l.jpg", "h.jpg")
    ]
    index = open_index(str(path), tmp_path / "cache")
    assert {ShardReader(index).read(number).tobytes() for number in range(len(index))} == {b"image"}
    assert "h: no image" in " ".join(f"{problem.key}: {problem.reason}" for problem in index.without_image())
    made = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in (path, *path.parents)}
    assert made == set(before)


def encoded(form, **options):
    photo = Image.fromarray(skimage.data.astronaut()).resize((40, 32))
    buffer = io.BytesIO()
    photo.save(buffer, form, **options)
    return buffer.getvalue()


def bands(write, **options):
    buffer = io.BytesIO()
    write(buffer, np.arange(32 * 40 * 5).astype(np.uint16).reshape(32, 40, 5), **options)
    return buffer.getvalue()


IMAGES = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "tiff": encoded("TIFF", compression="tiff_lzw"),
    "bands": bands(tifffile.imwrite, photometric="minisblack", planarconfig="contig", compression="zlib"),
    "npy": bands(np.save),
}


@pytest.mark.parametrize("examples", LONG)
@pytest.mark.parametrize("form", IMAGES)
def test_images(form, examples):
    channels = 5 if form in ("bands", "npy") else 3

    @settings(max_examples=examples, **FUZZ)
    @given(mutations(IMAGES[form]))
    def check(data):
        try:
            pixels = decode_image(array(data), channels)
        except ImageError as error:
            assert str(error)
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == channels and pixels.dtype in (torch.uint8, torch.float32)

    check()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_jpeg():
    data = bytearray(IMAGES["jpeg"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b""),
    "jpeg": bomb_jpeg(),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0"
    + struct.pack("<HHB", 60000, 60000, 0) + b"\x02\x02\x44\x01\x00;",
}  # fmt: skip


@pytest.mark.parametrize("limit", [2**26, None], ids=["PIL's own limit", "no limit of PIL's"])
@pytest.mark.parametrize("form", BOMBS)
def test_images_that_claim_too_many_pixels(form, limit, monkeypatch):
    """None is decoded, also where another library has taken away PIL's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(images, "_decode_jpeg", lambda data: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"60000 x 60000 pixels|3600000000 pixels"):
        decode_image(array(BOMBS[form]))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**400]) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def test_manifests(shards, tmp_path):
    """Any field of a good manifest becomes any JSON value."""
    make_shards(str(shards), tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    good = path.read_text()
    whole = json.loads(good)
    places = [(), ("shards",), ("index",), ("shards", 0)]
    fields = [(*place, key) for place in places for key in _at(whole, place) if isinstance(_at(whole, place), dict)]

    @settings(max_examples=200, **FUZZ)
    @given(st.sampled_from(fields), VALUES)
    def check(field, value):
        manifest = json.loads(good)
        _at(manifest, field[:-1])[field[-1]] = value
        path.write_text(json.dumps(manifest))
        try:
            assert len(open_index(str(path.parent), tmp_path / "cache")) == 32
        except DataError as error:
            assert str(path) in str(error)

    check()
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_manifest(b"[" * 10**6)


def _at(tree, place):
    for key in place:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("examples", LONG)
def test_indices(examples):
    rows = [(f"k{i}", 512 * i, 100, i) for i in range(5)]
    data = SampleTable.from_rows(rows).to_bytes([BadSample("s", "k", "r")])

    @settings(max_examples=examples, **FUZZ)
    @given(mutations(data))
    def check(data):
        try:
            table, problems = SampleTable.from_bytes(data)
        except ValueError as error:
            assert "no sample table" in str(error)
        else:
            assert all(isinstance(table.key(sample), str) for sample in range(len(table)))
            assert all(isinstance(problem, BadSample) for problem in problems)

    check()


def test_an_index_that_asks_for_more_memory_than_there_is(shards, tmp_path):
    index = open_index(str(shards))
    index.table.sizes[3] = 2**60
    with pytest.raises(ImageError, match="ends before"):
        ShardReader(index).read(3)
