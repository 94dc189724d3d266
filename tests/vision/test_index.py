"""Indices of data sets: cached tar indices, local and remote manifests, and reading by offset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa_train.errors import ConfigError, DataError
from moa_vision.cache import LostShard
from moa_vision.data import BatchSpec, DataConfig, val_loader
from moa_vision.images import ImageError
from moa_vision.index import ShardReader, expand, open_index, short_names
from moa_vision.table import index_tar


def keys_of(index):
    return [index.table.key(i) for i in range(len(index))]


def contents(index):
    reader = ShardReader(index)
    return [reader.read(i).tobytes() for i in range(len(index))]


# --- tars without a manifest --------------------------------------------------------------------------------------


def test_cached_index_is_used_until_the_shard_changes(shards, tmp_path, monkeypatch, write_tar):
    calls = []
    monkeypatch.setattr("moa_vision.index.index_tar", lambda *args: calls.append(args) or index_tar(*args))
    first = open_index(str(shards), tmp_path / "cache")
    assert keys_of(open_index(str(shards), tmp_path / "cache")) == keys_of(first) and len(calls) == 5
    write_tar(shards / "d.tar", [("new.jpg", b"12345")])
    changed = open_index(str(shards), tmp_path / "cache")
    assert len(calls) == 6 and "new" in keys_of(changed) and "d0" not in keys_of(changed)
    for cached in (tmp_path / "cache" / "index").iterdir():
        cached.write_bytes(cached.read_bytes()[:-9])
    assert keys_of(open_index(str(shards), tmp_path / "cache")) == keys_of(changed), "a damaged index is rebuilt"
    open_index(str(shards), tmp_path / "cache", image_key="jpg")
    assert len(calls) == 6 + 5 + 5, "an index belongs to its image_key"


def test_lost_samples_are_listed_apart_from_other_problems(tmp_path, write_tar):
    members = [("a.jpg", b"1"), ("a.cls", b"one"), ("b.json", b"{}")]
    for _ in ("scanned", "cached"):
        index = open_index(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "cache")
        assert [bad.key for bad in index.table.problems] == ["a", "b"]
        assert [bad.key for bad in index.without_image()] == ["b"]


def test_a_data_set_without_images_or_with_a_shard_twice_is_rejected(shards, tmp_path, write_tar):
    write_tar(tmp_path / "none.tar", [("c.json", b"{}")])
    with pytest.raises(DataError, match=r"no sample with an image .*the first: c in .*none\.tar: no image"):
        open_index(str(tmp_path / "none.tar"))
    with pytest.raises(ConfigError, match=r"names shard .*a\.tar twice"):
        open_index(f"{shards}/a.tar::{shards}/*.tar")


# --- manifests ------------------------------------------------------------------------------------------------------


def test_manifest_is_read_locally_and_remotely(packed, tmp_path, serve):
    local = open_index(str(packed))
    scanned = open_index(f"{packed}/*.tar")
    assert keys_of(local) == keys_of(scanned) and contents(local) == contents(scanned)
    assert local.table.labels.tolist() == scanned.table.labels.tolist()
    server = serve(packed)
    server.faults["manifest.json"] = ["cut", 500]
    for pattern in (server.url, f"{server.url}/manifest.json"):
        remote = open_index(pattern, tmp_path / "cache")
        assert keys_of(remote) == keys_of(local)
    assert set(server.requests) == {"manifest.json", "index.safetensors"}, "no shard before it is needed"
    assert contents(remote) == contents(local)


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m["shards"][0].update(name="pipe:touch hacked"), "name of a file is 'pipe:touch hacked'"),
    (lambda m: (m["shards"][2].update(samples=7), m.update(samples=31)), "it lists 31 samples, its index 32"),
    (lambda m: m["index"].update(sha256="0" * 64), "SHA-256 of .*index.safetensors differs"),
    (lambda m: (m["shards"][0].update(bytes=5), m.update(bytes=sum(s["bytes"] for s in m["shards"]))),
     "samples outside their shards"),
])  # fmt: skip
def test_inconsistent_manifests_are_rejected(packed, change, text):
    manifest = json.loads((packed / "manifest.json").read_text())
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest .*{text}"):
        open_index(str(packed))


def test_local_shards_must_have_the_size_of_the_manifest(packed):
    path = packed / "shard-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"shard-000002\.tar has \d+ bytes, the manifest lists"):
        open_index(str(packed))
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        open_index(str(packed))


# --- reading --------------------------------------------------------------------------------------------------------


def test_workers_fetch_each_shard_once(packed, tmp_path, serve):
    """Forked after this process has used fsspec's event loop."""
    server = serve(packed)
    config = DataConfig(train="", workers=2)
    index = open_index(server.url, tmp_path / "cache")
    batches = list(val_loader(index, config, BatchSpec((16, 16), 1), batch_size=4))
    assert [key for batch in batches for key in batch.keys] == [index.name(i) for i in range(32)]
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert sorted(shards) == sorted(path.name for path in packed.glob("*.tar"))


def test_a_shard_with_more_samples_than_may_be_bad_ends_reading(shards):
    index = open_index(str(shards))
    (shards / "b.tar").unlink()
    with pytest.raises(LostShard, match=r"b\.tar"):
        ShardReader(index, max_lost=4).read(9)
    with pytest.raises(DataError, match=r"b\.tar with 4 samples is unavailable, more than data\.max_bad_samples = 3"):
        ShardReader(index, max_lost=3).read(9)


def test_a_shrunk_shard_is_an_image_error(shards):
    index = open_index(str(shards))
    (shards / "b.tar").write_bytes(b"")
    with pytest.raises(ImageError, match="shard ends before"):
        ShardReader(index).read(9)


# --- patterns -------------------------------------------------------------------------------------------------------


def test_every_form_of_pattern_reads_the_same_samples(shards, tmp_path, serve):
    server = serve(shards)

    def contents(pattern):
        index = open_index(pattern, tmp_path / "cache")
        return [ShardReader(index).read(i).tobytes() for i in range(len(index))]

    expected = contents(str(shards))
    for pattern in (
        f"{shards}/{{a,b,c,d,e}}.tar",
        f"{shards}/[a-c].tar::file://{shards}/d.tar::{shards}/e.tar",
        f"{server.url}/{{a..e}}.tar",
        f"pipe:cat {shards}/{{a..e}}.tar",
    ):
        assert contents(pattern) == expected, pattern


def test_patterns_that_match_nothing_are_config_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty", r"has no manifest.*pack images first: .*--source .*/empty --out"),
        (tmp_path / "*.tar", "matches no shard"),
    ):
        with pytest.raises(ConfigError, match=message):
            expand(str(pattern))


def test_a_file_name_never_becomes_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch made.tar").write_bytes(b"")
    assert expand("*.tar") == expand("file:pipe:touch made.tar") == ["./pipe:touch made.tar"]


def test_remote_names():
    assert expand("hf://datasets/me/photos::https://host/x.tar?token=a") == [
        "hf://datasets/me/photos/manifest.json",
        "https://host/x.tar?token=a",
    ]


@pytest.mark.parametrize(("urls", "names"), [
    (["/x/t-0.tar", "/x/t-1.TAR", "t-2.tar"], ["t-0", "t-1", "t-2"]),
    (["https://h/t-0.tar?token=a/b", "pipe:aws s3 cp s3://b/t-1.tar -"], ["t-0", "t-1"]),
    (["a/t.tar", "b/t.tar", "b/c.tar"], ["a/t", "b/t", "b/c"]),
    (["https://h/get?file=0.tar", "https://h/get?file=1.tar"], ["https://h/get?file=0.tar", "https://h/get?file=1.tar"]),
])  # fmt: skip
def test_short_names_are_unique(urls, names):
    assert short_names(urls) == tuple(names)
