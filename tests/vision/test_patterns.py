"""Patterns of shards and the short names of shards."""

from __future__ import annotations

import re

import pytest

from moa_train.errors import ConfigError
from moa_vision.index import ShardReader, open_index
from moa_vision.patterns import expand, short_names


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
    ):
        assert contents(pattern) == expected, pattern


def test_patterns_that_match_nothing_are_config_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty", "has no manifest"),
        (tmp_path / "*.tar", "matches no shard"),
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


def test_remote_names():
    assert expand("hf://datasets/me/photos::https://host/x.tar?token=a") == [
        "hf://datasets/me/photos/manifest.json",
        "https://host/x.tar?token=a",
    ]


@pytest.mark.parametrize(("urls", "names"), [
    (["/x/t-0.tar", "/x/t-1.TAR", "t-2.tar"], ["t-0", "t-1", "t-2"]),
    (["https://h/t-0.tar?token=a/b", "s3://b/t-1.tar"], ["t-0", "t-1"]),
    (["a/t.tar", "b/t.tar", "b/c.tar"], ["a/t", "b/t", "b/c"]),
    (["https://h/get?file=0.tar", "https://h/get?file=1.tar"], ["https://h/get?file=0.tar", "https://h/get?file=1.tar"]),
])  # fmt: skip
def test_short_names_are_unique(urls, names):
    assert short_names(urls) == tuple(names)
