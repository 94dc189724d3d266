"""The demo's shards: split by photograph, reproducible, and of the stated size."""

import tarfile
import threading

import numpy as np
import skimage.data
from PIL import Image

from moa_vision import photographs, pretrain
from moa_vision.data import DataConfig
from moa_vision.photographs import TRAIN, VAL, VAL_PIXELS, crops, make_photograph_shards, photograph_file


def test_no_photograph_is_on_both_sides():
    assert not set(TRAIN) & set(VAL)
    sides = {name.startswith("skimage/motorcycle") for name in VAL}
    assert sides == {False}  # both views of the stereo pair are training images


def test_crops_are_parts_of_the_photograph():
    found = crops(photograph_file("skimage/chelsea.png"), 5)
    assert [crop.size for crop in found] == [(VAL_PIXELS, VAL_PIXELS)] * 5
    again = crops(photograph_file("skimage/chelsea.png"), 5)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    photograph = skimage.data.chelsea().reshape(-1, 3)
    for crop in found:  # a wrong channel order would show
        red, green, blue = np.asarray(crop).reshape(-1, 3).mean(0)
        assert photograph.min() <= blue < green < red <= photograph.max()


def test_shards_hold_whole_photographs_and_fixed_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "TRAIN", TRAIN[:2])
    monkeypatch.setattr(photographs, "VAL", VAL[:1])
    monkeypatch.setattr(photographs, "COPIES", 3)
    monkeypatch.setattr(photographs, "VAL_CROPS", 2)
    train, val = make_photograph_shards(tmp_path)
    assert (train.samples, val.samples, train.skipped, val.skipped) == (6, 2, [], [])
    found = {}
    for path in (tmp_path / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".jpg"):
                    found[name.removesuffix(".jpg")] = Image.open(tar.extractfile(name)).convert("RGB")
    assert found.keys() == {f"{stem}_{copy:03d}" for stem in ("astronaut", "brick") for copy in range(3)}
    whole = Image.open(photograph_file("skimage/astronaut.png")).convert("RGB").resize(found["astronaut_002"].size)
    assert min(whole.size) == photographs.SHORT_SIDE
    assert np.abs(np.asarray(whole, float) - np.asarray(found["astronaut_002"], float)).mean() < 4


def test_runs_that_start_together_make_the_shards_once(tmp_path, monkeypatch):
    """The runs of a sweep with --jobs: one makes the shards, the others wait for it."""
    monkeypatch.chdir(tmp_path)
    made, both = [], threading.Barrier(2)

    def make(folder):
        made.append(folder)
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True)
            (folder / split / "manifest.json").write_text("{}")

    def start():
        both.wait()
        pretrain.make_photographs(data)

    monkeypatch.setattr(pretrain, "make_photograph_shards", make)
    data = DataConfig(train=str(pretrain.PHOTOGRAPHS / "train"), val=str(pretrain.PHOTOGRAPHS / "val"))
    assert pretrain.photographs_are_missing(data)
    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [pretrain.PHOTOGRAPHS] and not pretrain.photographs_are_missing(data)
