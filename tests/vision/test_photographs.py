"""The demo's data: split by photograph, reproducible, and of the stated size."""

import tarfile

import numpy as np
from PIL import Image

from moa_vision import photographs
from moa_vision.photographs import TRAIN, VAL, main, photograph_file


def test_command_writes_whole_photographs_and_fixed_crops(tmp_path, monkeypatch, capsys):
    for name, value in {"TRAIN": TRAIN[:2], "VAL": VAL[:1], "COPIES": 3, "VAL_CROPS": 2}.items():
        monkeypatch.setattr(photographs, name, value)
    assert main(["--out", str(tmp_path)]) == 0
    assert "6 training and 2 held-out samples" in capsys.readouterr().out
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


def test_missing_photographs_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photographs, "TRAIN", ("skimage/none.png",))
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "none.png is missing; install it with: pip install" in capsys.readouterr().err
