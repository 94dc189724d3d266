"""Whole runs over a web server that misbehaves while they read: what is tried again, skipped, and given up."""

import json
import multiprocessing
import os
import resource
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from moa_train.errors import DataError
from moa_vision.bad_samples import BadSamples
from moa_vision.cache import ATTEMPTS, LostShard, Shard, local_path
from moa_vision.data import DataConfig, ImageBatch, require_cache_room, train_loader
from moa_vision.index import ShardReader, open_index
from moa_vision.pretrain import main
from moa_vision.shards import ShardSettings, make_shards
from moa_vision.table import BadSample


@pytest.fixture
def server(shards, tmp_path, serve):
    """Our own data set of the photographs, 8 shards of 4, behind a server."""
    make_shards(str(shards), tmp_path / "packed", ShardSettings(samples_per_shard=4))
    return serve(tmp_path / "packed")


@pytest.fixture
def train(tmp_path, server):
    """train(name, **changed) -> exit code and folder of a run of 8 steps of 8 images, two epochs, two workers."""

    def train(name, **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        encoder = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
        values = {
            "name": name,
            "out": tmp_path / "runs",
            "model.encoder": "vit_tiny_patch16_qdmoa",
            "model.img_size": 16,
            "model.encoder_args": json.dumps(encoder),
            "model.decoder_dim": 16,
            "model.decoder_depth": 1,
            "model.decoder_heads": 2,
            "data.train": server.url,
            "data.cache_dir": tmp_path / "caches" / name,
            "data.shuffle_window_shards": 1,
            "data.workers": 2,
            "schedule.epochs": 2,
            "schedule.warmup_epochs": 0,
            "schedule.batch_size": 8,
            "loop.micro_batch_size": 8,
            "loop.log_every": 1,
            "loop.trackers": "[]",
        } | {key.replace("__", "."): value for key, value in changed.items()}
        return main([f"--{key}={value}" for key, value in values.items()]), tmp_path / "runs" / name

    return train


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bad_samples(folder):
    path = folder / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_run_survives_a_server_that_fails_for_a_while(train, server, monkeypatch):
    monkeypatch.setattr("moa_vision.cache.STALL_S", 4.0)
    code, healthy = train("healthy")
    assert code == 0 and len(losses(healthy)) == 8
    faults = [[500, 503], ["cut"], ["stall"], [429, "cut", 500], ["silent cut"]]
    server.faults |= {f"shard-{number:06d}.tar": list(fault) for number, fault in enumerate(faults)}
    server.requests.clear()
    code, folder = train("ill")
    assert code == 0 and not any(server.faults.values()), "all that was to go wrong did"
    assert losses(folder) == losses(healthy) and not bad_samples(folder)
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert len(shards) == 8 + sum(map(len, faults)), "each fault took one more attempt"


def test_a_small_lost_shard_is_skipped_and_listed(train, server, tmp_path):
    server.faults["shard-000003.tar"] = [404] * 99
    code, folder = train("run", data__max_bad_samples=4)
    assert code == 0 and len(losses(folder)) == 8
    bad = bad_samples(folder)
    lost = open_index(str(tmp_path / "packed")).table
    assert sorted(sample["key"] for sample in bad) == sorted(lost.key(number) for number in range(12, 16))
    assert {sample["shard"] for sample in bad} == {f"{server.url}/shard-000003.tar"}
    assert all("cannot fetch" in sample["reason"] for sample in bad)
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == 4


def test_a_run_whose_local_shard_vanishes_can_be_started_again(train, server, tmp_path, monkeypatch, capsys):
    shard = tmp_path / "packed" / "shard-000003.tar"

    def vanish(*arguments, **options):
        shard.unlink()
        return train_loader(*arguments, **options)

    local = {"data__train": tmp_path / "packed", "data__workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr("moa_vision.pretrain.train_loader", vanish)
        assert train("run", data__max_bad_samples=3, **local)[0] == 1
    assert "shard-000003.tar with its 4 samples is lost" in capsys.readouterr().err
    assert train("run", data__max_bad_samples=3, **local)[0] == 1
    code, folder = train("run", data__max_bad_samples=4, **local)
    assert code == 0 and len(losses(folder)) == 8
    bad = bad_samples(folder)
    assert len(bad) == 4 and {sample["shard"] for sample in bad} == {str(shard)}


@pytest.mark.parametrize("fault", [404, pytest.param(500, marks=pytest.mark.slow)], ids=["gone", "ill for good"])
def test_a_lost_shard_with_more_samples_than_the_limit_ends_the_run(train, server, capsys, fault):
    server.faults["shard-000003.tar"] = [fault] * 99
    code, folder = train("run", data__max_bad_samples=3)
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "shard-000003.tar with its 4 samples is lost, and data.max_bad_samples is 3: cannot fetch" in error
    assert not bad_samples(folder), "no sample is blamed for its shard"
    assert not multiprocessing.active_children(), "a worker that goes on would keep the program from ending"
    server.faults.clear()
    assert train("run", data__max_bad_samples=3)[0] == 0, "the same command goes on when the shard is back"


def test_wrong_bytes_are_named(train, server, capsys, tmp_path):
    path = tmp_path / "packed" / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[900] ^= 1
    path.write_bytes(data)
    code, _ = train("run", data__max_bad_samples=3)
    error = capsys.readouterr().err
    assert code == 1 and "shard-000002.tar" in error and "its SHA-256 is not the manifest's" in error


def test_samples_without_an_image_are_listed_too(train, shards, write_tar, photos, encode, tmp_path, capsys):
    image = encode(photos[0])
    write_tar(shards / "f.tar", [("f0.cls", b"1"), ("f1.json", b"{}"), ("f2.jpg", image), ("f2.jpg", image)])
    write_tar(tmp_path / "val.tar", [("v0.jpg", image), ("v1.cls", b"1")])
    for session in ("first", "queued again"):
        code, _ = train("run", data__train=shards, data__max_bad_samples=1)
        assert code == 1 and "f1 in " in capsys.readouterr().err, session
    code, folder = train("run", data__train=shards, data__val=tmp_path / "val.tar", data__max_bad_samples=4)
    assert code == 0, "a run goes on with a higher limit"
    assert [(sample["key"], sample["reason"][:13]) for sample in bad_samples(folder)] == [
        ("f2.jpg (2)", "f2.jpg occurs"), ("f0", "no image amon"), ("f1", "no image amon"), ("v1", "no image amon"),
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == 4


def test_a_full_disk_is_told(server, tmp_path, monkeypatch):
    """No sample is bad because there is no room for it: the run stops, and says where to make some."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    index = open_index(server.url, tmp_path / "cache")
    monkeypatch.setattr("moa_vision.cache._transfer", full)
    for read in (
        lambda: local_path(Shard(f"{server.url}/shard-000000.tar"), tmp_path / "cache"),
        lambda: ShardReader(index).read(0),
        lambda: list(batches(index)),
    ):
        with pytest.raises(DataError, match=r"cannot keep .*No space left.*data\.cache_gib.*data\.cache_dir") as error:
            read()
        assert not isinstance(error.value, LostShard)
    assert not list((tmp_path / "cache" / "shards").glob("*.tmp"))


def batches(index, **fields):
    config = DataConfig(train="", workers=0, **fields)
    return train_loader(index, config, image_size=(16, 16), num_patches=1, seed=0, global_batch=4, micro_batch=4,
                        num_steps=1)  # fmt: skip


def test_a_lost_shard_is_tried_again_after_a_while(server, tmp_path, monkeypatch):
    reader = ShardReader(open_index(server.url, tmp_path / "cache"))
    server.faults["shard-000000.tar"] = [404]
    for _ in range(2):
        with pytest.raises(LostShard, match=r"FileNotFound"):
            reader.read(0)
    assert server.requests.count("shard-000000.tar") == 1
    monkeypatch.setattr("moa_vision.cache.LOST_S", -1.0)
    assert len(reader.read(0)) and server.requests.count("shard-000000.tar") == 2


def test_all_processes_make_one_series_of_attempts(server, tmp_path):
    """Readers of the same run (each rank's workers) believe the first; a run that begins later tries for itself."""
    first, second = (ShardReader(open_index(server.url, tmp_path / "cache")) for _ in range(2))
    server.faults["shard-000000.tar"] = [500] * ATTEMPTS
    for reader in (first, second):
        with pytest.raises(LostShard, match=rf"cannot fetch .*attempt {ATTEMPTS} of {ATTEMPTS}"):
            reader.read(0)
    assert server.requests.count("shard-000000.tar") == ATTEMPTS
    (mark,) = (tmp_path / "cache" / "shards").glob("*.lost")
    assert "cannot fetch" in json.loads(mark.read_text())["reason"]
    assert len(ShardReader(open_index(server.url, tmp_path / "cache")).read(0)), "a run that begins after that"
    assert not mark.exists()
    server.faults["shard-000001.tar"] = [404]
    with pytest.raises(LostShard):
        first.read(4)
    (mark,) = (tmp_path / "cache" / "shards").glob("*.lost")
    for content in (b"", b"[1]", b'{"time_s": 1e999, "reason": 3', b'{"time_s": null}', b"\xff", b"[" * 10**5):
        mark.write_bytes(content)
        assert len(ShardReader(second.index).read(4))
        next((tmp_path / "cache" / "shards").glob("*-shard-000001.tar")).unlink()


@pytest.mark.parametrize(
    ("moves_s", "stalls_s", "attempts"),
    [(0.0, 0.0, ATTEMPTS), (0.0, 60.0, 4), (0.0, 200.0, 2), (1000.0, 0.0, ATTEMPTS), (1000.0, 60.0, 4)],
    ids=["fails", "stalls", "long, then fails", "moves, is cut", "moves, stalls"],
)
def test_a_series_of_attempts_ends_in_time(tmp_path, monkeypatch, moves_s, stalls_s, attempts):
    """Whoever waits for the lock, and the ranks that wait for that one, do so for 5 minutes where nothing moves."""
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    def transfer(shard, path):
        transfers.append(clock[0] - moves_s * len(transfers))
        if moves_s:
            path.write_bytes(b"half")
            clock[0] += moves_s
            os.utime(path, (clock[0], clock[0]))
        clock[0] += stalls_s
        raise OSError("nothing comes")

    transfers = []
    monkeypatch.setattr("moa_vision.cache._transfer", transfer)
    monkeypatch.setattr(
        "moa_vision.cache.time", SimpleNamespace(monotonic=lambda: clock[0], time=lambda: clock[0], sleep=sleep)
    )
    with pytest.raises(LostShard, match=rf"attempt {attempts} of {ATTEMPTS}"):
        local_path(Shard("http://127.0.0.1:1/a.tar"), tmp_path)
    assert len(transfers) == attempts and transfers[-1] + 60 <= 300
    if stalls_s == 0:
        assert transfers == [2.0**number - 1 for number in range(ATTEMPTS)]


def test_the_limit_is_that_of_all_processes(tmp_path, capsys):
    bad = [BadSample("a.tar", str(number), "why") for number in range(5)]
    ranks = [BadSamples(tmp_path / "bad_samples.jsonl", 3) for _ in range(3)]
    for rank, sample in zip(ranks, bad, strict=False):
        rank.note([sample])
    ranks[0].note(bad[:3])
    assert capsys.readouterr().out.count("warning: skipped") == 3, "each told by one process"
    with pytest.raises(DataError, match=r"4 bad samples, more than data\.max_bad_samples = 3"):
        ranks[1].note([bad[3]])
    with pytest.raises(DataError, match="5 bad samples"):
        BadSamples(tmp_path / "bad_samples.jsonl", 3).note([bad[4]])
    assert ranks[2].recorded() == 5


def test_no_session_goes_on_beyond_the_limit(tmp_path):
    """The samples that ended one are known to the next, and are still too many."""
    path = tmp_path / "bad_samples.jsonl"
    bad = [BadSample("a.tar", str(number), "why") for number in range(4)]
    told = rf"4 bad samples, more than data\.max_bad_samples = 3 .*Make or fetch .* delete {path}.*raise the limit"

    def batches():
        for sample in bad:
            yield ImageBatch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1), ["a"], torch.zeros(1), [sample])

    for used in (3, 0, 0):
        read = BadSamples(path, 3).good(batches())
        assert len([next(read) for _ in range(used)]) == used
        with pytest.raises(DataError, match=told):
            next(read)
        with pytest.raises(DataError, match=told):
            BadSamples(path, 3).note(bad)
    assert len(path.read_text().splitlines()) == 4
    assert len(list(BadSamples(path, 4).good(batches()))) == 4
    path.unlink()
    assert len(list(BadSamples(path, 3).good(ImageBatch(*batch[:4], []) for batch in batches()))) == 4, "mended"


def test_bad_samples_that_cannot_be_written_count(tmp_path, capsys):
    """A limit on the size of files fails writes as a full disk does, in the kernel; so does a file for a folder."""
    path = tmp_path / "run" / "bad_samples.jsonl"
    first, second, third, fourth = (BadSample("a.tar", key, "why") for key in "abcd")
    samples = BadSamples(path, 2)
    samples.note([first])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
    try:
        samples.note([second])
        with pytest.raises(DataError, match="3 bad samples"):
            samples.note([third])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().out.count(f"warning: {path} could not be written (") == 2
    assert samples.recorded() == 3
    again = BadSamples(path, 2)
    again.note([fourth])
    assert list(BadSamples(path, 2).known.values()) == [first, fourth], "what was cut short is left behind"
    BadSamples(path / "below", 2).note([first])
    assert f"warning: {path / 'below'} could not be written (" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1], ids=["no worker", "a worker"])
def test_samples_that_end_the_run_are_listed(tmp_path, write_tar, workers):
    write_tar(tmp_path / "none.tar", [(f"{number}.jpg", b"nothing") for number in range(4)])
    config = DataConfig(train="", workers=workers)
    loader = train_loader(open_index(str(tmp_path / "none.tar")), config, image_size=(16, 16), num_patches=1, seed=0,
                          global_batch=2, micro_batch=2, num_steps=1)  # fmt: skip
    samples = BadSamples(tmp_path / "bad_samples.jsonl", 100)
    with pytest.raises(DataError, match=r"^4 samples in a row are bad, the last . in .*none\.tar.*again\.$"):
        list(samples.good(loader))
    assert sorted(sample["key"] for sample in bad_samples(tmp_path)) == ["0", "1", "2", "3"]
    assert not multiprocessing.active_children()


def test_a_list_of_bad_samples_that_was_cut_short_is_read_and_continued(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first, second, third = (BadSample("a.tar", key, "why") for key in "abc")
    BadSamples(path, 9).note([first, second])
    path.write_bytes(path.read_bytes()[:-9])
    again = BadSamples(path, 9)
    assert list(again.known.values()) == [first]
    again.note([first, second, third])
    assert list(BadSamples(path, 9).known.values()) == [first, second, third]
    path.write_bytes(b'[1]\n{"shard": 3, "key": "x", "reason": "y"}\n\xff\n{"a": 1}\n' + b"[" * 10**5 + b"\n")
    assert BadSamples(path, 9).recorded() == 0


def test_a_cache_smaller_than_two_windows_is_refused(train, server, capsys):
    code, _ = train("run", data__cache_gib=1e-6, data__shuffle_window_shards=2)
    error = capsys.readouterr().err
    assert code == 2
    assert "data.cache_gib is 1e-06; allowed: " in error and "data.shuffle_window_shards = 2" in error
    index = open_index(server.url)
    sizes = sorted(shard.size for shard in index.shards)
    just = sum(sizes[-4:]) / 2**30
    require_cache_room(DataConfig(train="", shuffle_window_shards=2, cache_gib=just), index)
    with pytest.raises(ValueError, match=r"data\.cache_gib"):
        require_cache_room(DataConfig(train="", shuffle_window_shards=2, cache_gib=just * 0.999), index)


@pytest.mark.slow
def test_a_run_within_a_bounded_cache_has_the_same_losses(train, server, tmp_path):
    _, free = train("free")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "packed").glob("*.tar"))
    code, bounded = train("bounded", data__workers=1, data__cache_gib=sum(sizes[-2:]) / 2**30)
    assert code == 0 and losses(bounded) == losses(free)
    kept = [path.stat().st_size for path in (tmp_path / "caches" / "bounded" / "shards").glob("*.tar")]
    assert 0 < sum(kept) <= sum(sizes[-2:])
