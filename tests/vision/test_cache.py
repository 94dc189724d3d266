"""The shard cache: transfers, retries, checksums and eviction, shared by processes that may be killed."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from moa_train.errors import DataError
from moa_vision import cache
from moa_vision.cache import ATTEMPTS, LostShard, Shard, ShardCache, hold, make_room, release
from moa_vision.index import ShardReader, open_index

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(shards, serve):
    return serve(shards)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- transfers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[503, 429], ["cut", 500, "garbled"]])
def test_temporary_errors_are_retried(server, shards, tmp_path, faults):
    server.faults["a.tar"] = list(faults)
    path = ShardCache(tmp_path / "cache").fetch(Shard(f"{server.url}/a.tar"))
    assert path.read_bytes() == (shards / "a.tar").read_bytes()
    assert len(server.requests) == len(faults) + 1
    assert sorted(child.suffix for child in path.parent.iterdir()) == [".lock", ".tar"]


@pytest.mark.parametrize(("fault", "tries", "text"), [
    (404, 1, "FileNotFound"), (403, 1, "403"), (500, ATTEMPTS, f"attempt {ATTEMPTS} of {ATTEMPTS}.*500"),
])  # fmt: skip
def test_final_error_names_the_url(server, tmp_path, fault, tries, text):
    server.faults["a.tar"] = [fault] * 9
    with pytest.raises(LostShard, match=rf"cannot fetch http.*a\.tar.*{text}"):
        ShardCache(tmp_path / "cache").fetch(Shard(f"{server.url}/a.tar"))
    assert len(server.requests) == tries
    assert not list(tmp_path.glob("cache/shards/*.tar*tmp*"))


def test_checksum_is_verified_after_the_transfer(server, shards, tmp_path):
    data = (shards / "a.tar").read_bytes()
    with pytest.raises(LostShard, match=r"a\.tar.*SHA-256 differs"):
        ShardCache(tmp_path / "cache").fetch(Shard(f"{server.url}/a.tar", len(data), "0" * 64))
    assert len(server.requests) == ATTEMPTS
    good = Shard(f"{server.url}/a.tar", len(data), hashlib.sha256(data).hexdigest())
    assert ShardCache(tmp_path / "cache").fetch(good).read_bytes() == data


def test_a_stalled_transfer_fails(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "STALL_S", 0.2)
    monkeypatch.setattr(cache, "ATTEMPTS", 2)
    server.faults["a.tar"] = ["stall"] * 2
    with pytest.raises(LostShard, match=r"attempt 2 of 2.*Timeout"):
        ShardCache(tmp_path / "cache").fetch(Shard(f"{server.url}/a.tar"))


def test_failing_pipe_reports_its_exit_status(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(cache, "BACKOFF_S", 0.0)
    with pytest.raises(LostShard, match="exit status 3"):
        ShardCache(tmp_path / "cache").fetch(Shard(f"pipe:head -c 5000 {shards}/a.tar; exit 3"))


def test_full_disk_is_not_retried(server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_transfer", full)
    with pytest.raises(DataError, match=r"cannot store .*No space left.*data\.cache_gib.*data\.cache_dir"):
        ShardCache(tmp_path / "cache").fetch(Shard(f"{server.url}/a.tar"))


class Hub:
    """The endpoints of the Hugging Face Hub that list and serve the files of one data set."""

    def do_GET(self):
        name = self.path.split("?")[0]
        files = sorted(Path(self.directory).glob("*.tar"))
        if name in ("/api/datasets/timm/imagenet-1k-wds", "/api/datasets/timm/imagenet-1k-wds/revision/main"):
            self.answer({"id": "timm/imagenet-1k-wds", "sha": "0" * 40, "siblings": []})
        elif name.endswith("/tree/main"):
            self.answer([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files])
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

    for number, path in enumerate(sorted(shards.glob("*.tar"))):  # the layout of timm/imagenet-1k-wds
        path.rename(shards / f"imagenet1k-train-{number:04d}.tar")
    local = open_index(str(shards))
    server = serve(shards, Hub)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    url = "hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-"
    for pattern in (f"{url}{{0000..0004}}.tar", f"{url}*.tar"):
        index = open_index(pattern, tmp_path / "cache")
        assert index.identity() == local.identity()
        assert ShardReader(index).read(31).tobytes() == ShardReader(local).read(31).tobytes()


# --- shared by processes ------------------------------------------------------------------------------------------


def hammer(url, cache_dir, limit_gib, expected, seed, reads):
    """Compare samples read in random order; exit with 1 at a difference."""
    index = open_index(url, cache_dir, limit_gib)
    reader = ShardReader(index, open_files=1)
    draw = random.Random(seed)
    for _ in range(reads):
        sample = draw.randrange(len(index))
        if reader.read(sample).tobytes() != expected[sample]:
            os._exit(1)
    os._exit(0)


def test_processes_share_a_bounded_cache(write_tar, serve, tmp_path):
    """Three processes, one of them killed, read 12 shards with room for about five."""
    expected = [bytes([number]) * 20_000 for number in range(24)]
    size = 0
    for number in range(12):
        members = [(f"{i}.jpg", expected[i]) for i in (2 * number, 2 * number + 1)]
        size = write_tar(tmp_path / "set" / f"{number:02d}.tar", members).stat().st_size
    server = serve(tmp_path / "set")
    arguments = (f"{server.url}/{{00..11}}.tar", tmp_path / "cache", 5.5 * size / 2**30, expected)
    processes = [FORK.Process(target=hammer, args=(*arguments, seed, 80)) for seed in range(3)]
    for process in processes:
        process.start()
    end = time.monotonic() + 120
    while len(server.requests) < 20 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes[1:]] == [0, 0]
    assert len(server.requests) > 24, "shards were evicted and fetched again"
    make_room(tmp_path / "cache" / "shards", int(5.5 * size))
    kept = [path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix != ".lock"]
    assert sum(path.stat().st_size for path in kept) <= 5.5 * size and {path.suffix for path in kept} == {".tar"}


def test_a_cut_transfer_does_not_stay_in_the_cache(server, tmp_path):
    """Without a manifest or a length, only the tar shows that its end is missing."""
    server.faults["a.tar"] = ["silent cut"]
    with pytest.raises(DataError, match=r"a\.tar: truncated"):
        open_index(f"{server.url}/a.tar", tmp_path / "cache")
    assert len(open_index(f"{server.url}/a.tar", tmp_path / "cache")) == 9


def test_a_lost_shard_is_not_retried_by_other_readers_of_the_run(server, tmp_path, monkeypatch):
    shard = Shard(f"{server.url}/a.tar")
    first, second = ShardCache(tmp_path / "cache"), ShardCache(tmp_path / "cache")
    server.faults["a.tar"] = [404]
    for shard_cache in (first, second):
        with pytest.raises(LostShard, match="cannot fetch http"):
            shard_cache.fetch(shard)
    assert len(server.requests) == 1
    assert ShardCache(tmp_path / "cache").fetch(shard).exists(), "a run that starts later tries again"
    server.faults["b.tar"] = [404]
    with pytest.raises(LostShard):
        first.fetch(Shard(f"{server.url}/b.tar"))
    monkeypatch.setattr(cache, "LOST_S", -1.0)
    assert first.fetch(Shard(f"{server.url}/b.tar")).exists(), "tried again after a while"
    assert not list(tmp_path.rglob("*.lost"))


# --- eviction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    """cached(sizes) -> a folder of files 0.tar, 1.tar, ... of these sizes, the first used longest ago."""

    def cached(*sizes):
        folder = tmp_path / "cached"
        folder.mkdir()
        for number, size in enumerate(sizes):
            (folder / f"{number}.tar").write_bytes(bytes(size))
            os.utime(folder / f"{number}.tar", (1000 + number, 1000 + number))
        return folder

    return cached


def test_least_recently_used_are_evicted_first(cached):
    folder = cached(10, 20, 30, 40)
    make_room(folder, 100)
    assert len(names(folder)) == 4
    release(hold(folder / "0.tar"))  # used now
    make_room(folder, 100, incoming=15)
    assert names(folder) == ["0.tar", "2.tar", "3.tar"]


def test_files_in_use_are_not_evicted(cached, caplog):
    folder = cached(10, 20, 30)
    files = [hold(folder / "0.tar"), hold(folder / "0.tar")]
    make_room(folder, 5)
    assert names(folder) == ["0.tar"] and "exceeds data.cache_gib" in caplog.text
    release(files[0])
    make_room(folder, 5)
    assert names(folder) == ["0.tar"], "the second reader is left"
    release(files[1])
    make_room(folder, 5)
    assert not names(folder)


def test_leftovers_of_killed_transfers_are_removed(cached):
    folder = cached(10)
    for name in ("a.tar", "b.tar"):
        (folder / f"{name}.tmp").write_bytes(b"half")
        (folder / f"{name}.lock").write_bytes(b"")
    with FileLock(folder / "b.tar.lock"):  # in progress
        make_room(folder, None)
        assert [name for name in names(folder) if not name.endswith(".lock")] == ["0.tar", "b.tar.tmp"]
