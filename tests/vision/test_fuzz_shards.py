"""Folders of shards that something has damaged: `make_shards` goes on, or says what is wrong."""

import shutil

import numpy as np
import pytest
from PIL import Image

from moa_train.errors import DataError
from moa_vision import shards
from moa_vision.shards import ShardSettings, make_shards

SETTINGS = ShardSettings(samples_per_shard=3)


def stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def images(tmp_path):
    """Eight small pictures and something else."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((6, 7, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "8.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("state", ["finished", "broken off"])
def test_going_on(fuzz, fuzzing, images, tmp_path, monkeypatch, state):
    """A folder of an earlier run with one file damaged, and the same command again; nothing else is touched."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # the power stays on
    out = tmp_path / "sets" / "set"
    if state == "finished":
        make_shards(str(images), out, SETTINGS)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards, "_publish", stop)
            make_shards(str(images), out, SETTINGS)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(names) > 4

    def attempt(example):
        name, content = example
        again = shutil.copytree(out, tmp_path / "sets" / "again")
        try:
            (again / name).write_bytes(content)
            error = fuzzing.refusal(lambda: make_shards(str(images), again, SETTINGS), ValueError, DataError, OSError)
        finally:
            shutil.rmtree(again)
        assert error is None or str(again) in str(error), error
        assert [path.name for path in (tmp_path / "sets").iterdir()] == ["set"] and len([*images.iterdir()]) == 9

    fuzz(fuzzing.damage(out, names), attempt, examples=6)


def test_a_record_of_another_file_deletes_nothing(images, tmp_path):
    """A shard that an earlier run recorded and this one has no use for is deleted: only if it is one."""
    out = tmp_path / "set"
    (tmp_path / "kept.tar").write_text("mine")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_publish", stop)
        make_shards(str(images), out, SETTINGS)
    record = next(out.rglob("*.tar.json"))
    record.with_name("x.tar.json").write_text(record.read_text().replace("shard-000000.tar", "../kept.tar"))
    make_shards(str(images), out, SETTINGS)
    assert (tmp_path / "kept.tar").read_text() == "mine"
