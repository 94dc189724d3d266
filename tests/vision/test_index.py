"""Patterns, indices and the cache: every way to name shards, and every way in which they can be broken."""

import errno
import gc
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train.errors import DataError
from moa_vision import cache
from moa_vision.cache import LostShard, Shard, local_path
from moa_vision.data import DataConfig, val_loader
from moa_vision.images import ImageError
from moa_vision.index import ShardReader, expand, open_index, parse_manifest, short_names
from moa_vision.shards import ShardSettings, make_shards
from moa_vision.table import SampleTable, index_tar


def keys_of(index):
    return [index.table.key(i) for i in range(len(index))]


def contents(index):
    reader = ShardReader(index)
    return [reader.read(i).tobytes() for i in range(len(index))]


@pytest.fixture
def server(shards, serve):
    return serve(shards)


# --- what the index says ------------------------------------------------------------------------------------------


# webdataset leaves the files that it has read to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_index_agrees_with_webdataset_and_tarfile(shards):
    index = open_index(str(shards))
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert keys_of(index) == [sample["__key__"] for sample in theirs]
    assert contents(index) == [sample["jpg"] for sample in theirs]
    assert index.table.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    assert index.starts.tolist() == [0, 9, 13, 20, 21, 32]
    with tarfile.open(urls[2]) as tar:
        member = tar.getmember("c3.jpg")
    row = keys_of(index).index("c3")
    assert (index.table.offsets[row], index.table.sizes[row]) == (member.offset_data, member.size)
    assert index.shards[index.shard_of(row)].url == urls[2]
    assert not index.problems
    gc.collect()  # here, where it may warn


def test_every_way_to_name_shards(shards, tmp_path, server):
    expected = contents(open_index(str(shards)))
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in shards.iterdir():
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    for pattern in (
        f"{shards}/{{a,b,c,d,e}}.tar",
        f"{shards}/*.tar",
        f"{shards}/[a-c].tar::file://{shards}/d.tar::{shards}/e.tar",
        f"{packed}",
        f"{packed}/{{a..e}}.tar.gz",
        f"{server.url}/{{a..e}}.tar",
        f"pipe:cat {shards}/{{a..e}}.tar",
        f"pipe:cat {packed}/{{a..e}}.tar.gz",
    ):
        assert contents(open_index(pattern, tmp_path / "cache")) == expected, pattern


class Hub:
    """As much of the Hugging Face Hub as it takes to list and fetch the files of one data set."""

    def do_GET(self):
        name = self.path.split("?")[0]
        files = sorted(Path(self.directory).glob("*.tar"))
        if name in ("/api/datasets/timm/imagenet-1k-wds", "/api/datasets/timm/imagenet-1k-wds/revision/main"):
            self.answer({"id": "timm/imagenet-1k-wds", "sha": "0" * 40, "siblings": []})
        elif name.endswith("/tree/main"):
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            self.answer(entries)
        elif "/resolve/main/" in name:
            self.path = f"/{name.split('/')[-1]}"
            super().do_GET()
        else:
            self.send_error(404)

    do_POST = do_GET

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_hub_data_sets_are_read(shards, tmp_path, monkeypatch, serve):
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    for number, path in enumerate(sorted(shards.glob("*.tar"))):  # the layout of timm/imagenet-1k-wds
        path.rename(folder / f"imagenet1k-train-{number:04d}.tar")
    expected = contents(open_index(str(folder)))
    server = serve(folder, Hub)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    names = "hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-"
    assert contents(open_index(f"{names}{{0000..0004}}.tar", tmp_path / "a")) == expected
    assert contents(open_index(f"{names}*.tar", tmp_path / "b")) == expected


def test_names_that_name_nothing(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        open_index(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="holds no manifest"):
        open_index(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="names no shard"):
        open_index(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="named twice"):
        open_index(f"{shards}/a.tar::{shards}/*.tar")
    with pytest.raises(DataError, match="cannot open zzz://"):
        open_index("zzz://host/a.tar")
    make_shards(str(shards), tmp_path / "set", val_fraction=0.5)
    with pytest.raises(ValueError, match="did you mean one of its folders train, val"):
        open_index(str(tmp_path / "set"))


# --- what is kept -------------------------------------------------------------------------------------------------


def test_index_is_kept_until_the_shard_changes(shards, tmp_path, monkeypatch, write_tar):
    calls = []
    monkeypatch.setattr("moa_vision.index.index_tar", lambda *args: calls.append(args) or index_tar(*args))
    first = open_index(str(shards), tmp_path / "cache")
    assert len(calls) == 5
    again = open_index(str(shards), tmp_path / "cache")
    assert len(calls) == 5 and keys_of(again) == keys_of(first)
    write_tar(shards / "d.tar", [("new.jpg", b"12345")])
    os.utime(shards / "d.tar", ns=(1, 1))
    changed = open_index(str(shards), tmp_path / "cache")
    assert len(calls) == 6 and "new" in keys_of(changed) and "d0" not in keys_of(changed)
    for kept in (tmp_path / "cache" / "index").iterdir():  # a damaged one is built again
        kept.write_bytes(kept.read_bytes()[:-9])
    assert keys_of(open_index(str(shards), tmp_path / "cache")) == keys_of(changed)


def test_index_needs_no_writable_cache(shards, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(open_index(str(shards), tmp_path / "file")) == 32
    assert "cannot be kept" in caplog.text


def test_remote_shards_are_fetched_once_by_any_number_of_processes(server, shards, tmp_path):
    context = multiprocessing.get_context("fork")
    shard = Shard(f"{server.url}/e.tar")
    readers = [context.Process(target=local_path, args=(shard, tmp_path / "cache")) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(600)
        assert reader.exitcode == 0
    assert local_path(shard, tmp_path / "cache").read_bytes() == (shards / "e.tar").read_bytes()
    open_index(shard.url, tmp_path / "cache")
    assert server.requests == ["e.tar"]


@pytest.mark.parametrize("faults", [[503], ["cut", 500, "cut"], [429, 408], ["garbled"]])
def test_transfers_are_tried_again(server, shards, tmp_path, faults):
    server.faults["a.tar"] = list(faults)
    path = local_path(Shard(f"{server.url}/a.tar"), tmp_path / "cache")
    assert path.read_bytes() == (shards / "a.tar").read_bytes()
    assert len(server.requests) == len(faults) + 1
    assert sorted(child.suffix for child in path.parent.iterdir()) == [".lock", ".tar"]


@pytest.mark.parametrize(
    ("faults", "tries", "text"),
    [
        ([404] * 9, 1, "FileNotFound"),
        ([403] * 9, 1, "403"),
        ([500] * 9, 8, "500"),
        (["cut"] * 9, 8, "attempt 8"),
        (["garbled"] * 9, 8, "attempt 8"),
    ],
)
def test_transfers_that_cannot_succeed_end(server, tmp_path, faults, tries, text):
    server.faults["a.tar"] = list(faults)
    with pytest.raises(DataError, match=rf"a\.tar.*{text}"):
        local_path(Shard(f"{server.url}/a.tar"), tmp_path / "cache")
    assert len(server.requests) == tries
    assert not [child for child in (tmp_path / "cache" / "shards").iterdir() if child.suffix not in (".lock", ".lost")]


def test_stalled_transfer_is_given_up(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "STALL_S", 0.2)
    monkeypatch.setattr(cache, "ATTEMPTS", 2)
    server.faults["a.tar"] = ["stall"] * 2
    with pytest.raises(DataError, match=r"attempt 2 of 2.*nothing came for 0\.2 s"):
        local_path(Shard(f"{server.url}/a.tar"), tmp_path)
    assert "a.tar failed (nothing came for 0.2 s)" in caplog.text


def test_failing_pipe_is_named(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(cache, "BACKOFF_S", 0.0)
    with pytest.raises(DataError, match="exit 3"):
        open_index(f"pipe:head -c 5000 {shards}/a.tar; exit 3", tmp_path)


def test_a_pipe_that_stalls_is_ended_with_all_that_it_started(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(cache, "STALL_S", 0.3)
    monkeypatch.setattr(cache, "ATTEMPTS", 2)
    monkeypatch.setattr(cache, "BACKOFF_S", 0.0)
    mark = str(1000 + os.getpid() / 2**22)
    for command in (f"head -c 5000 {shards}/a.tar; sleep {mark}; true", f"exec >&-; sleep {mark}"):
        with pytest.raises(DataError, match=r"attempt 2 of 2.*nothing came for 0\.3 s"):
            open_index(f"pipe:{command}", tmp_path)
    assert not [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]


@pytest.mark.parametrize("source", ["server", "pipe"])
def test_no_more_is_written_than_a_shard_has(server, shards, tmp_path, monkeypatch, source):
    monkeypatch.setattr(cache, "ATTEMPTS", 2)
    server.faults["a.tar"] = ["endless"] * 2
    url = f"{server.url}/a.tar" if source == "server" else f"pipe:head -c {2**28} /dev/zero"
    written = []
    monkeypatch.setattr(cache, "_idle_s", lambda path, lasted_s: written.append(path.stat().st_size) or 0.0)
    with pytest.raises(LostShard, match=r"attempt 2 of 2.*more than the 30720 bytes came"):
        local_path(Shard(url, 30_720), tmp_path)
    assert len(written) == 2 and max(written) <= 2**23, "a few of the transfer's pieces"
    assert server.sent < 2**27


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(shards, tmp_path):
    """Our own data set of the photographs: 4 shards of 8."""
    make_shards(str(shards), tmp_path / "packed", ShardSettings(samples_per_shard=8))
    return tmp_path / "packed"


def test_manifest_is_read_locally_and_remotely(packed, tmp_path, serve):
    local = open_index(str(packed))
    scanned = open_index(f"{packed}/*.tar")
    assert keys_of(local) == keys_of(scanned) and contents(local) == contents(scanned)
    assert local.table.labels.tolist() == scanned.table.labels.tolist()
    server = serve(packed)
    for pattern in (server.url, f"{server.url}/", f"{server.url}/manifest.json"):
        remote = open_index(pattern, tmp_path / "cache")
        assert keys_of(remote) == keys_of(local)
    assert set(server.requests) == {"manifest.json", "index.safetensors"}  # no shard before it is needed
    assert contents(remote) == contents(local)


@pytest.mark.parametrize("faults", [["silent cut", "garbled", "silent cut"], ["cut", 500]])
def test_a_manifest_that_comes_cut_is_read_again(packed, tmp_path, serve, faults):
    server = serve(packed)
    server.faults["manifest.json"] = list(faults)
    assert keys_of(open_index(server.url, tmp_path / "cache")) == keys_of(open_index(str(packed)))
    assert server.requests.count("manifest.json") == len(faults) + 1


def test_a_manifest_that_cannot_be_one_ends(packed, tmp_path, serve, monkeypatch):
    server = serve(packed)
    server.faults["manifest.json"] = ["silent cut"] * cache.PARSE_ATTEMPTS
    with pytest.raises(DataError, match=r"manifest http.*: Unterminated string|Expecting"):
        open_index(server.url, tmp_path / "cache")
    assert not server.faults["manifest.json"]
    monkeypatch.setattr(cache, "MAX_READ", 2**20)
    server.faults["manifest.json"] = ["endless"] * 2
    with pytest.raises(DataError, match=r"manifest\.json: .*more than the 1048576 bytes came .*it is no manifest"):
        open_index(server.url, tmp_path / "cache")
    assert server.sent < 2**27 and len(server.faults["manifest.json"]) == 1


def test_workers_fetch_the_shards_that_they_need(packed, tmp_path, serve):
    """Forked after this process has used the connection's threads; each shard comes once."""
    server = serve(packed)
    options = {"image_size": (16, 16), "num_patches": 1, "batch_size": 4}
    config = DataConfig(train="", workers=2)
    batches = list(val_loader(open_index(server.url, tmp_path / "cache"), config, **options))
    local = open_index(str(packed))
    assert [key for batch in batches for key in batch.keys] == [local.name(i) for i in range(len(local))]
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert sorted(shards) == sorted(path.name for path in packed.glob("*.tar"))


def test_remote_shard_must_match_its_manifest(packed, tmp_path, serve):
    shard = bytearray((packed / "shard-000001.tar").read_bytes())
    shard[2000] ^= 1
    (packed / "shard-000001.tar").write_bytes(shard)
    server = serve(packed)
    reader = ShardReader(open_index(server.url, tmp_path / "cache"))
    assert len(reader.read(0))
    for sample in (8, 9):  # the second is not fetched again
        with pytest.raises(DataError, match=r"shard-000001\.tar.*SHA-256"):
            reader.read(sample)
    assert server.requests.count("shard-000001.tar") == cache.ATTEMPTS


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["shards"][0].update(name="pipe:touch hacked"), "not a plain file name"),
        (lambda m: m["shards"][0].update(name="../shard-000000.tar"), "not a plain file name"),
        (lambda m: m["index"].update(name="http://host/index"), "not a plain file name"),
        (lambda m: m["shards"][2].update(size=5), "outside their shards"),
        (
            lambda m: m["shards"][2].update(size=m["shards"][2]["size"] - 512),
            r"shard-000002\.tar has not the \d+ bytes",
        ),
        (lambda m: [s.update(size=10**9) for s in m["shards"]], "has not the 1000000000 bytes"),
        (lambda m: m["shards"][2].update(samples=7), "counts 31 samples, its index 32"),
        (lambda m: m["shards"][2].update(samples="8"), '"samples" of shard-000002.tar'),
        (lambda m: m["shards"].append({"name": "x.tar"}), '"sha256" of x.tar'),
        (lambda m: m["index"].update(sha256="0" * 64), "not the index it was written with"),
        (lambda m: m.update(format="other"), '"format"'),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(label_names=[1]), "label_names"),
        (lambda m: m.update(shards={}), "shards"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(packed, change, text):
    manifest = json.loads((packed / "manifest.json").read_text())
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=text):
        open_index(str(packed))
    assert not Path("hacked").exists()


def test_a_local_set_is_read_as_far_as_it_is_there(packed, tmp_path, caplog):
    """By training; what is packed from it would lack those samples for good."""
    expected = contents(open_index(str(packed)))
    (packed / "shard-000001.tar").unlink()
    last = packed / "shard-000003.tar"
    index = open_index(str(packed))
    last.write_bytes(last.read_bytes()[: int(index.table.offsets[31])])
    assert "1 of the 4 shards" in caplog.text and "shard-000001.tar" in caplog.text
    reader = ShardReader(open_index(str(packed)))
    assert "2 of the 4 shards" in caplog.text
    for sample, data in enumerate(expected):
        if sample in (*range(8, 16), 31):
            with pytest.raises((LostShard, ImageError), match="cannot read shard" if sample < 31 else "shard ends"):
                reader.read(sample)
        else:
            assert reader.read(sample).tobytes() == data
    with pytest.raises(DataError, match=r"shard-000001\.tar has not"):
        make_shards(str(packed), tmp_path / "again")


@given(st.binary(max_size=200) | st.from_regex(rb'\{"format": "moa-vision-shards".*\}', fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_manifest_or_a_clear_error(data):
    with pytest.raises(ValueError):
        parse_manifest(data)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-12_000], "truncated inside|unexpected end|damaged at byte"),
        (lambda data: data[:700], "truncated inside"),
        (lambda data: data[:300], "cannot read shard"),
        (lambda data: b"", "empty file"),
        (lambda data: b"no tar" * 500, "cannot read shard"),
        (lambda data: _damage_header(data), "damaged at byte"),
        (lambda data: gzip.compress(data)[:-400], "cannot fetch"),
    ],
)
def test_damaged_shards_are_named(shards, tmp_path, damage, text):
    path = shards / "b.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=text) as error:
        open_index(str(shards), tmp_path / "cache")
    assert "b.tar" in str(error.value)


def test_a_shard_cut_between_members_is_told(shards, tmp_path):
    """Its headers look whole; what is missing are the zeros at the end."""
    path = shards / "b.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[4].offset])
    index = open_index(str(shards), tmp_path / "cache")
    (problem,) = index.without_image()
    assert (problem.shard, problem.key) == (str(path), "(end)") and "may have been cut off" in problem.reason
    assert len(index) == 32 - 2


def test_images_of_one_name_are_counted_each(tmp_path, write_tar):
    members = ("a.jpg", "a.cls", "a.jpg", "a.JPG", "a.cls", "a (2).jpg", "b/a.json", "a.jpg")
    write_tar(tmp_path / "a.tar", [(name, b"1") for name in members])
    for _ in ("scanned", "kept"):
        index = open_index(str(tmp_path / "a.tar"), tmp_path / "cache")
        assert keys_of(index) == ["a", "a (2)"]
        assert [bad.key for bad in index.without_image()] == ["a.jpg (2)", "a.JPG (3)", "a.jpg (4)", "b/a"]


def _damage_header(data):
    """Spoils the header of the third member."""
    with tarfile.open(fileobj=__import__("io").BytesIO(data)) as tar:
        offset = tar.getmembers()[2].offset
    return data[: offset + 150] + b"zzzz" + data[offset + 154 :]


def test_odd_members(tmp_path, write_tar):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    write_tar(
        tmp_path / "odd.tar",
        [
            ("__meta__", b"x"),
            ("dir/a.jpg", b"A"),
            ("b.jpg", b"B"),  # interleaved with a
            ("dir/a.cls", b"7"),
            ("b.cls", b"seven"),
            ("b.jpg", b"second"),
            ("c.json", b"{}"),
            ("c.pyd", bomb),
            ("d.pkl", bomb),
            ("d.png", b""),
            ("d.cls", b"-3"),
            ("noextension", b""),
            ("E.JPEG", b"E"),
            ("E.cls", b"12\n"),
            ("\udcff.jpg", b"F"),  # a name that is not UTF-8
        ],
    )
    index = open_index(str(tmp_path / "odd.tar"))
    assert keys_of(index) == ["dir/a", "b", "d", "E", "?"]
    assert contents(index) == [b"A", b"B", b"", b"E", b"F"]
    assert index.table.labels.tolist() == [7, -1, -1, 12, -1]
    assert [(bad.key, bad.reason.split(" ")[0]) for bad in index.problems] == [
        ("b.jpg (2)", "b.jpg"), ("b", "no"), ("c", "no"), ("d", "no"),
    ]  # fmt: skip
    assert all(bad.shard.endswith("odd.tar") for bad in index.problems)
    assert not (tmp_path / "exploded").exists()
    write_tar(tmp_path / "none.tar", [("c.json", b"{}")])
    with pytest.raises(DataError, match="no sample with an image"):
        open_index(str(tmp_path / "none.tar"))


# webdataset leaves the files that it has read to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("fields", "image_key", "used"), [
    (["json", "input.jpg", "cls"], None, "input.jpg"),
    (["input.jpg", "npy", "features.npy"], None, "input.jpg"),
    (["bands.npy", "cls"], None, "bands.npy"),
    (["IMAGE.JPG"], None, "image.jpg"),
    (["1.jpg", "txt"], None, "1.jpg"),
    (["img"], None, "img"),
    (["seg.png", "webp", "jpg"], None, "jpg"),
    (["seg.png", "jpg"], "seg.png", "seg.png"),
    (["input", "target"], ".Target", "target"),
    (["input.jpg", "target.jpg"], "jpg;input.jpg", "input.jpg"),
])  # fmt: skip
def test_the_image_has_any_field(tmp_path, write_tar, fields, image_key, used):
    write_tar(tmp_path / "a.tar", [(f"dir/k.{field}", field.encode()) for field in fields])
    (theirs,) = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    for _ in ("scanned", "kept"):
        index = open_index(str(tmp_path / "a.tar"), image_key=image_key)
        assert keys_of(index) == [theirs["__key__"]] and contents(index) == [theirs[used]]


@pytest.mark.parametrize(("fields", "image_key", "reason"), [
    (["input", "txt"], None, r"a.tar: no image among its members \(input, txt\); choose one with data.image_key"),
    (["jpg", "png"], "webp;input.jpg", r"no webp or input.jpg among its members \(jpg, png\)"),
    ([f"{i}.jpg" for i in range(9)], None, r"several images \(0.jpg, .*7.jpg, ...\); choose one with data.image_key"),
])  # fmt: skip
def test_what_was_found_instead_of_an_image(tmp_path, write_tar, fields, image_key, reason):
    write_tar(tmp_path / "a.tar", [(f"k.{field}", field.encode()) for field in fields])
    with pytest.raises(DataError, match=reason):
        open_index(str(tmp_path / "a.tar"), image_key=image_key)
    if image_key:
        assert len(open_index(str(tmp_path / "a.tar"))) == 1, "no index of another image_key is taken"


# --- the table ----------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(
            st.tuples(st.text(max_size=9), st.integers(0, 2**60), st.integers(0, 2**40), st.integers(-1, 9999)),
            max_size=5,
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_table_keeps_its_rows(groups):
    table = SampleTable.concatenate([SampleTable.from_rows(group) for group in groups])
    rows = [row for group in groups for row in group]
    for same in (table, SampleTable.from_bytes(table.to_bytes())[0], pickle.loads(ForkingPickler.dumps(table))):
        numbers = zip(same.offsets.tolist(), same.sizes.tolist(), same.labels.tolist(), strict=True)
        assert [(same.key(i), *row) for i, row in enumerate(numbers)] == rows
        assert all(isinstance(getattr(same, name), np.ndarray) for name in SampleTable.__annotations__)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_table_or_a_clear_error(data):
    with pytest.raises(ValueError, match="no sample table"):
        SampleTable.from_bytes(data)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "complex64", "float64"])
def test_a_table_of_other_types_is_a_clear_error(name):
    tensors = safetensors.torch.load(SampleTable.from_rows([("a", 0, 1, 2)]).to_bytes())
    data = safetensors.torch.save(tensors | {"offsets": torch.zeros(1, dtype=getattr(torch, name))})
    with pytest.raises(ValueError, match="no sample table"):
        SampleTable.from_bytes(data)


def test_reader_keeps_few_files_open(tmp_path, write_tar, monkeypatch):
    monkeypatch.setattr("moa_vision.index._OPEN_FILES", 3)
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", bytes([number]) * 9)])
    index = open_index(str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    reader = ShardReader(index)
    for sample in [*range(8), *range(8)]:
        assert reader.read(sample).tobytes() == bytes([sample]) * 9
    assert not before or len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert hashlib.sha256((tmp_path / "3.tar").read_bytes()).hexdigest() == cache.file_sha256(tmp_path / "3.tar")


@pytest.fixture
def failing(monkeypatch):
    """failing(name, calls): the next calls of os.NAME fail as a network file system's do; pauses are short."""
    monkeypatch.setattr("moa_train.open_files.RETRY_S", 0.0)
    monkeypatch.setattr(cache, "BACKOFF_S", 0.0)
    faults = {}

    def failing(name, calls):
        original = getattr(os, name)

        def call(*arguments):
            if faults[name] > 0:
                faults[name] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return original(*arguments)

        faults[name] = calls
        monkeypatch.setattr(os, name, call)

    return failing


@pytest.mark.parametrize("name", ["preadv", "fstat", "open"])
def test_a_local_shard_that_fails_for_once_is_opened_again(shards, tmp_path, failing, name):
    index = open_index(str(shards), tmp_path / "cache")
    expected = contents(index)
    reader = ShardReader(index)
    if name != "open":
        assert reader.read(0).tobytes() == expected[0]
    failing(name, 1)
    for sample in range(9):
        assert reader.read(sample).tobytes() == expected[sample]
    failing(name, 2)
    with pytest.raises((OSError, LostShard), match="Stale file handle"):
        (reader if name != "open" else ShardReader(index)).read(0)


@pytest.mark.parametrize(("urls", "names"), [
    (["/x/t-0.tar", "/x/t-1.tar.gz", "t-2.TGZ"], ["t-0", "t-1", "t-2"]),
    (["https://h/t-0.tar?token=a/b", "pipe:aws s3 cp s3://b/t-1.tar -"], ["t-0", "t-1"]),
    (["a/t.tar", "b/t.tar", "b/c.tar"], ["a/t", "b/t", "b/c"]),
    (["https://h/get?file=0.tar", "https://h/get?file=1.tar"], ["https://h/get?file=0.tar", "https://h/get?file=1.tar"]),
])  # fmt: skip
def test_short_names_tell_shards_apart(urls, names):
    assert short_names(urls) == tuple(names)


def test_a_files_name_is_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch made.tar").write_bytes(b"")
    assert expand("*.tar") == expand("file:pipe:touch made.tar") == ["./pipe:touch made.tar"]


def test_expand_keeps_pipes_as_they_are():
    assert expand("pipe:aws s3 cp s3://b/{0..1}.tar -") == [
        "pipe:aws s3 cp s3://b/0.tar -",
        "pipe:aws s3 cp s3://b/1.tar -",
    ]
    assert expand("hf://datasets/me/photos::https://host/x.tar?token=a") == [
        "hf://datasets/me/photos/manifest.json",
        "https://host/x.tar?token=a",
    ]
