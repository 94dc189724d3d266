"""A cache with a limit, shared by processes that read, make room and are killed."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from filelock import FileLock

from moa_vision.cache import ATTEMPTS, LostShard, Shard, local_path, open_shard
from moa_vision.cache_eviction import hold, make_room, release
from moa_vision.index import ShardReader, open_index

FORK = multiprocessing.get_context("fork")


def fill(folder, *sizes):
    """Files 0, 1, ... of these sizes, the first used longest ago."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number}.tar").write_bytes(bytes(size))
        os.utime(folder / f"{number}.tar", (1000 + number, 1000 + number))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_least_recently_used_go_first(tmp_path):
    fill(tmp_path / "shards", 10, 20, 30, 40)
    make_room(tmp_path / "shards", 100)
    assert len(names(tmp_path / "shards")) == 4
    release(hold(tmp_path / "shards" / "0.tar"))  # used now
    make_room(tmp_path / "shards", 100, wanted=15)
    assert names(tmp_path / "shards") == ["0.tar", "2.tar", "3.tar"]
    make_room(tmp_path / "shards", 0, keep=tmp_path / "shards" / "2.tar")
    assert names(tmp_path / "shards") == ["2.tar"]


def test_files_in_use_stay(tmp_path, caplog):
    fill(tmp_path / "shards", 10, 20, 30)
    files = [hold(tmp_path / "shards" / "0.tar"), hold(tmp_path / "shards" / "0.tar")]
    make_room(tmp_path / "shards", 5)
    assert names(tmp_path / "shards") == ["0.tar"] and "above data.cache_gib" in caplog.text
    release(files[0])
    make_room(tmp_path / "shards", 5)
    assert names(tmp_path / "shards") == ["0.tar"], "one of two readers is left"
    release(files[1])
    make_room(tmp_path / "shards", 5)
    assert not names(tmp_path / "shards")
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "shards" / "0.tar")


def test_what_killed_transfers_left_is_removed(tmp_path):
    folder = tmp_path / "shards"
    fill(folder, 10)
    for name in ("a.tar", "b.tar"):
        (folder / f"{name}.tmp").write_bytes(b"half")
        (folder / f"{name}.tmp.unpacked").write_bytes(b"half")
        (folder / f"{name}.lock").write_bytes(b"")
    with FileLock(folder / "b.tar.lock"):  # this one goes on
        make_room(folder, None)
        left = [name for name in names(folder) if not name.endswith(".lock")]
        assert left == ["0.tar", "b.tar.tmp", "b.tar.tmp.unpacked"]


def test_a_process_killed_within_a_transfer_leaves_nothing_behind(shards, serve, tmp_path):
    cache = tmp_path / "cache"
    server = serve(shards)
    server.faults["a.tar"] = ["stall"]
    process = FORK.Process(target=local_path, args=(Shard(f"{server.url}/a.tar"), cache))
    process.start()
    end = time.monotonic() + 120
    while not list(cache.glob("shards/*.tmp")) and time.monotonic() < end:
        time.sleep(0.01)
    assert list(cache.glob("shards/*.tmp"))
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    local_path(Shard(f"{server.url}/b.tar"), cache)
    assert not list(cache.glob("shards/*.tmp")) and len(list(cache.glob("shards/*.tar"))) == 1
    assert local_path(Shard(f"{server.url}/a.tar"), cache).read_bytes() == (shards / "a.tar").read_bytes()


def test_a_shard_that_goes_between_look_up_and_opening_is_fetched_again(shards, serve, tmp_path, monkeypatch):
    server = serve(shards)
    shard = Shard(f"{server.url}/a.tar")
    taken = []

    def hold_too_late(path):
        if not taken:
            taken.append(path)
            path.unlink()
        return hold(path)

    monkeypatch.setattr("moa_vision.cache.hold", hold_too_late)
    opened = open_shard(shard, tmp_path)
    assert os.pread(opened.file, 10**7, 0) == (shards / "a.tar").read_bytes()
    opened.close()
    assert server.requests == ["a.tar"] * 2


def test_a_shard_that_is_cut_when_it_is_fetched_again_is_not_kept(shards, serve, tmp_path, caplog):
    """No manifest tells its size: the index does. Nor is one used that was let in cut."""
    server = serve(shards)
    index = open_index(f"{server.url}/a.tar", tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "shards").glob("*.tar")
    whole = ShardReader(index).read(8).tobytes()
    kept.unlink()  # as whoever makes room does
    server.faults["a.tar"] = ["silent cut"] * 2
    assert ShardReader(index).read(8).tobytes() == whole and not server.faults["a.tar"]
    assert "bytes came, and its samples end at " in caplog.text
    kept.write_bytes(kept.read_bytes()[:-30_000])
    assert ShardReader(index).read(8).tobytes() == whole
    assert server.requests == ["a.tar"] * 5
    kept.unlink()
    server.faults["a.tar"] = ["silent cut"] * ATTEMPTS
    with pytest.raises(LostShard, match=r"a\.tar .*it is cut, or has changed"):
        ShardReader(index).read(0)
    assert not kept.exists()


def hammer(url, cache_dir, limit_gib, expected, seed, reads):
    """Reads samples at random and compares them; exit code 1 where one differs."""
    index = open_index(url, cache_dir, limit_gib)
    reader = ShardReader(index, open_files=1)
    draw = random.Random(seed)
    for _ in range(reads):
        sample = draw.randrange(len(index))
        if reader.read(sample).tobytes() != expected[sample]:
            os._exit(1)
    os._exit(0)


def test_processes_share_a_bounded_cache(write_tar, serve, tmp_path):
    """Three processes, one of them killed on the way, read 12 shards where there is room for about five."""
    expected = [bytes([number]) * 20_000 for number in range(24)]
    for number in range(12):
        write_tar(tmp_path / "set" / f"{number:02d}.tar", [
            (f"{2 * number}.jpg", expected[2 * number]), (f"{2 * number + 1}.jpg", expected[2 * number + 1]),
        ])  # fmt: skip
    size = (tmp_path / "set" / "00.tar").stat().st_size
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
    assert len(server.requests) > 24, "shards went and came again"
    local_path(Shard(f"{server.url}/00.tar"), tmp_path / "cache", limit=int(5.5 * size))
    kept = [path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix != ".lock"]
    assert sum(path.stat().st_size for path in kept) <= 5.5 * size
    assert all(path.suffix == ".tar" for path in kept)
