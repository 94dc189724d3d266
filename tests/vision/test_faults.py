"""Training runs over a server with faults: what is retried, skipped, and fatal."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from accelerate.state import AcceleratorState

from moa_vision import cache
from moa_vision.index import open_index
from moa_vision.pretrain import main
from moa_vision.shards import ShardSettings, make_shards


@pytest.fixture
def server(shards, tmp_path, serve):
    """A server of a packed data set of the photographs, 8 shards of 4."""
    make_shards(str(shards), tmp_path / "packed", ShardSettings(samples_per_shard=4))
    return serve(tmp_path / "packed")


@pytest.fixture
def train(tmp_path, server, small_run):
    """train(name, **changed) -> exit code and folder of a run of 8 steps of 8 images, two epochs, two workers."""

    def train(name, **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        data = {"data__train": server.url, "data__cache_dir": tmp_path / "caches" / name, "data__workers": 2}
        return main(
            small_run(name=name, data__shuffle_window_shards=1, **{**data, **changed})
        ), tmp_path / "runs" / name

    return train


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bad_samples(folder):
    path = folder / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_temporary_faults_do_not_change_the_losses(train, server, monkeypatch):
    monkeypatch.setattr(cache, "STALL_S", 4.0)
    code, healthy = train("healthy")
    assert code == 0 and len(losses(healthy)) == 8
    faults = [[500, 503], ["cut"], ["stall"], [429, "cut", 500], ["silent cut"]]
    server.faults |= {f"shard-{number:06d}.tar": list(fault) for number, fault in enumerate(faults)}
    server.requests.clear()
    code, folder = train("faulty")
    assert code == 0 and not any(server.faults.values()), "every fault happened"
    assert losses(folder) == losses(healthy) and not bad_samples(folder)
    shards = [name for name in server.requests if name.endswith(".tar")]
    assert len(shards) == 8 + sum(map(len, faults)), "each fault cost one attempt"


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


def test_a_lost_shard_larger_than_the_limit_ends_the_run(train, server, capsys):
    server.faults["shard-000003.tar"] = [404] * 99
    code, folder = train("run", data__max_bad_samples=3)
    error = capsys.readouterr().err
    assert code != 0
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "shard-000003.tar with 4 samples is unavailable, more than data.max_bad_samples = 3 allows: " in error
    assert not bad_samples(folder), "no sample is blamed for its shard"
    assert not multiprocessing.active_children(), "a remaining worker would block the exit"
    server.faults.clear()
    assert train("run", data__max_bad_samples=3)[0] == 0, "the same command resumes when the shard is back"


def test_samples_without_an_image_count_in_every_session(train, shards, write_tar, photos, encode, tmp_path, capsys):
    image = encode(photos[0])
    write_tar(shards / "f.tar", [("f0.cls", b"1"), ("f1.json", b"{}"), ("f2.jpg", image), ("f2.jpg", image)])
    write_tar(tmp_path / "val.tar", [("v0.jpg", image), ("v1.cls", b"1")])
    for session in ("first", "requeued"):
        code, _ = train("run", data__train=shards, data__max_bad_samples=1)
        assert code != 0 and "f1 in " in capsys.readouterr().err, session
    code, folder = train("run", data__train=shards, data__val=tmp_path / "val.tar", data__max_bad_samples=4)
    assert code == 0, "a run continues with a higher limit"
    assert [sample["key"].split(" ")[0] for sample in bad_samples(folder)] == ["f2.jpg", "f0", "f1", "v1"]
