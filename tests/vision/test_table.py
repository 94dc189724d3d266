"""Tars as tables of samples: members, images, labels, duplicates and damage."""

from __future__ import annotations

import gc
import gzip
import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train.errors import DataError
from moa_vision.images import ImageError
from moa_vision.table import SampleTable, image_member, index_tar

# webdataset leaves the files that it has read to the garbage collector
UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")


def keys_of(table):
    return [table.key(i) for i in range(len(table))]


@UNCLOSED
def test_table_agrees_with_webdataset_and_tarfile(shards):
    table = index_tar(shards / "c.tar")
    theirs = list(webdataset.WebDataset(str(shards / "c.tar"), shardshuffle=False))
    data = (shards / "c.tar").read_bytes()
    assert keys_of(table) == [sample["__key__"] for sample in theirs] and not table.problems
    assert table.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    spans = zip(table.offsets, table.sizes, strict=True)
    assert [data[offset : offset + size] for offset, size in spans] == [sample["jpg"] for sample in theirs]
    with tarfile.open(shards / "c.tar") as tar:
        assert table.offsets[3] == tar.getmember("c3.jpg").offset_data
    gc.collect()  # here, where it may warn


def test_odd_members_are_skipped_and_reported(tmp_path, write_tar):
    path = write_tar(tmp_path / "odd.tar", [
        ("__meta__", b"x"), ("dir/a.jpg", b"A"), ("b.jpg", b"B"), ("dir/a.cls", b"7"), ("b.cls", b"seven"),
        ("b.jpg", b"second"), ("c.json", b"{}"), ("c.pyd", b"pickle"), ("d.png", b""), ("d.cls", b"-3"),
        ("noextension", b""), ("E.JPEG", b"E"), ("E.cls", b"12\n"), ("\udcff.jpg", b"F"),
    ])  # fmt: skip
    table = index_tar(path)
    assert keys_of(table) == ["dir/a", "b", "d", "E", "?"]
    assert table.sizes.tolist() == [1, 1, 0, 1, 1] and table.labels.tolist() == [7, -1, -1, 12, -1]
    assert [(bad.key, bad.reason[:8]) for bad in table.problems[1:]] == [
        ("b", "no label"),
        ("c", "no image"),
        ("d", "no label"),
    ]
    assert table.problems[0].key.startswith("b.jpg at byte ") and "occurs more than once" in table.problems[0].reason


def damaged_header(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[2].offset
    return data[: offset + 150] + b"zzzz" + data[offset + 154 :]


@pytest.mark.parametrize(("damage", "text"), [
    (lambda data: data[:-12_000], "truncated inside|unexpected end|damaged at byte"),
    (lambda data: b"no tar" * 500, "invalid header|bad checksum"),
    (damaged_header, "damaged at byte"),
    (gzip.compress, "invalid header|truncated header"),
])  # fmt: skip
def test_damaged_tars_are_named(shards, damage, text):
    path = shards / "b.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"cannot read shard .*b\.tar: .*({text})"):
        index_tar(path)


def test_a_tar_cut_between_members_is_reported(shards):
    path = shards / "b.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[4].offset])
    table = index_tar(path)
    (problem,) = table.problems
    assert (problem.shard, problem.key) == (str(path), "(end)") and "no end marker" in problem.reason
    assert len(table) == 2


@UNCLOSED
@pytest.mark.parametrize(("fields", "image_key", "used"), [
    (["json", "input.jpg", "cls"], None, "input.jpg"),
    (["input.jpg", "npy", "features.npy"], None, "input.jpg"),
    (["bands.npy", "cls"], None, "bands.npy"),
    (["IMAGE.JPG"], None, "image.jpg"),
    (["seg.png", "webp", "jpg"], None, "jpg"),
    (["seg.png", "jpg"], "seg.png", "seg.png"),
    (["input", "target"], ".Target", "target"),
    (["input.jpg", "target.jpg"], "jpg;input.jpg", "input.jpg"),
])  # fmt: skip
def test_image_member(tmp_path, write_tar, fields, image_key, used):
    path = write_tar(tmp_path / "a.tar", [(f"dir/k.{field}", field.encode()) for field in fields])
    (theirs,) = webdataset.WebDataset(str(path), shardshuffle=False)
    table = index_tar(path, image_key=image_key)
    offset, size = int(table.offsets[0]), int(table.sizes[0])
    assert keys_of(table) == [theirs["__key__"]] and path.read_bytes()[offset : offset + size] == theirs[used]


@pytest.mark.parametrize(("fields", "image_key", "reason"), [
    (["input", "txt"], None, r"no image among its members \(input, txt\); choose one with data.image_key"),
    (["jpg", "png"], "webp;input.jpg", r"no webp or input.jpg among its members \(jpg, png\)"),
    (["a.jpg", "b.jpg"], None, r"several images \(a.jpg, b.jpg\); choose one with data.image_key"),
])  # fmt: skip
def test_missing_or_ambiguous_images_are_named(fields, image_key, reason):
    with pytest.raises(ImageError, match=reason):
        image_member(dict.fromkeys(fields, (0, 0)), image_key)


ROWS = st.tuples(st.text(max_size=9), st.integers(0, 2**60), st.integers(0, 2**40), st.integers(-1, 9999))


@given(st.lists(st.lists(ROWS, max_size=5), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_table_round_trips(groups):
    table = SampleTable.concatenate([SampleTable.from_rows(group) for group in groups])
    rows = [row for group in groups for row in group]
    for same in (table, SampleTable.from_bytes(table.to_bytes())):
        numbers = zip(same.offsets.tolist(), same.sizes.tolist(), same.labels.tolist(), strict=True)
        assert [(same.key(i), *row) for i, row in enumerate(numbers)] == rows
