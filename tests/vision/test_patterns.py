"""Patterns of shards and the short names of shards."""

from __future__ import annotations

import gzip
import re

import pytest

from moa_train.errors import ConfigError
from moa_vision.index import ShardReader, open_index
from moa_vision.patterns import expand, short_names
from moa_vision.shards import make_shards


def test_every_form_of_pattern_reads_the_same_samples(shards, tmp_path, serve):
    server = serve(shards)
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in shards.iterdir():
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))

    def contents(pattern):
        index = open_index(pattern, tmp_path / "cache")
        return [ShardReader(index).read(i).tobytes() for i in range(len(index))]

    expected = contents(str(shards))
    for pattern in (
        f"{shards}/{{a,b,c,d,e}}.tar",
        f"{shards}/[a-c].tar::file://{shards}/d.tar::{shards}/e.tar",
        f"{packed}",
        f"{server.url}/{{a..e}}.tar",
    ):
        assert contents(pattern) == expected, pattern


def test_patterns_that_match_nothing_are_config_errors(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    make_shards(str(shards), tmp_path / "set", val_fraction=0.5)
    for pattern, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty", "has no manifest"),
        (tmp_path / "*.tar", "matches no shard"),
        (tmp_path / "set", "did you mean one of its folders train, val"),
    ):
        with pytest.raises(ConfigError, match=message):
            expand(str(pattern))


@pytest.mark.parametrize("folder", ["photos", "photos/cats", "."])
def test_image_folders_are_answered_with_the_packing_command(folder, tmp_path, monkeypatch):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "a.JPEG").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    hint = f"pack images first: python scripts/make_shards.py --source {folder} --out"
    with pytest.raises(ConfigError, match=re.escape(hint)):
        expand(folder)
    with pytest.raises(ConfigError, match=r"a\.JPEG is an image, not a shard; pack .* --source photos/cats "):
        expand("photos/**/*.JPEG")


def test_remote_names():
    assert expand("hf://datasets/me/photos::https://host/x.tar?token=a") == [
        "hf://datasets/me/photos/manifest.json",
        "https://host/x.tar?token=a",
    ]


@pytest.mark.parametrize(("urls", "names"), [
    (["/x/t-0.tar", "/x/t-1.tar.gz", "t-2.TGZ"], ["t-0", "t-1", "t-2"]),
    (["https://h/t-0.tar?token=a/b", "s3://b/t-1.tar"], ["t-0", "t-1"]),
    (["a/t.tar", "b/t.tar", "b/c.tar"], ["a/t", "b/t", "b/c"]),
    (["https://h/get?file=0.tar", "https://h/get?file=1.tar"], ["https://h/get?file=0.tar", "https://h/get?file=1.tar"]),
])  # fmt: skip
def test_short_names_are_unique(urls, names):
    assert short_names(urls) == tuple(names)
