"""The limit of bad samples over processes and sessions."""

from __future__ import annotations

import multiprocessing
import re

import pytest
import torch

from moa_train.errors import DataError, message
from moa_vision.bad_samples import BadSamples
from moa_vision.data import BatchSpec, DataConfig, ImageBatch, train_loader
from moa_vision.index import open_index
from moa_vision.table import BadSample

BAD = [BadSample("a.tar", str(number), "why") for number in range(5)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "bad_samples.jsonl"


def test_limit_counts_all_processes(path, capsys):
    ranks = [BadSamples(path, 3) for _ in range(3)]
    for rank, sample in zip(ranks, BAD, strict=False):
        rank.note([sample])
    ranks[0].note(BAD[:3])
    assert capsys.readouterr().out.count("warning: skipped") == 3, "each is logged by one process"
    with pytest.raises(DataError, match=r"4 bad samples, more than data\.max_bad_samples = 3"):
        ranks[1].note([BAD[3]])
    assert ranks[2].recorded() == 4


def test_no_session_continues_beyond_the_limit(path):
    def batches():
        for sample in BAD[:4]:
            yield ImageBatch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1), ["a"], torch.zeros(1), [sample])

    message = rf"4 bad samples, more than data\.max_bad_samples = 3 .*delete {path}.*raise the limit"
    for used in (3, 0):
        good = BadSamples(path, 3).good(batches())
        assert len([next(good) for _ in range(used)]) == used
        with pytest.raises(DataError, match=message):
            next(good)
    with path.open("a") as file:
        file.write('{"shard": ')  # cut short by kill -9
    assert len(list(BadSamples(path, 4).good(batches()))) == 4, "the limit was raised"


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_line_and_end_them(path, write_tar, workers):
    index = open_index(str(write_tar(path.parent / "none.tar", [(f"{i}.jpg", b"nothing") for i in range(4)])))
    config, step = DataConfig(train="", workers=workers), {"global_batch": 2, "micro_batch": 2, "num_steps": 1}
    loader = train_loader(index, config, BatchSpec((16, 16), 1), seed=0, **step)
    with pytest.raises(DataError) as error:
        list(BadSamples(path, 100).good(loader))
    assert re.fullmatch(r"4 samples in a row are bad, the last is . in .*none\.tar.*again\.", message(error.value))
    assert not multiprocessing.active_children()
