"""Sources to pack: folders, tars, torchvision and Hugging Face data sets."""

from __future__ import annotations

import pytest
from PIL import Image
from torchvision import datasets as torchvision_datasets

from moa_train.errors import ConfigError, DataError
from moa_vision.images import ImageError
from moa_vision.index import ShardReader, open_index
from moa_vision.shards import make_shards
from moa_vision.sources import open_source


def read_all(source):
    """Return image, label and further fields of each item by name; None if it is unreadable."""
    samples = {}
    for item in source.items:
        try:
            samples[item.name] = tuple(source.read(item))
        except ImageError:
            samples[item.name] = None
    return samples


def test_folder_ignores_and_logs_other_files(tmp_path, caplog):
    for name in ("a.jfif", "b.JPE", "c.avif", "e.pgm", "f.1", "README", "notes.txt", "more.txt"):
        (tmp_path / name).write_text("")
    source = open_source(str(tmp_path))
    assert [item.name for item in source.items] == ["a.jfif", "b.JPE", "c.avif", "e.pgm"]
    assert "4 files below" in caplog.text and ".txt (2), " in caplog.text and "no suffix (1)" in caplog.text


def test_keys_are_unique_and_plain(tmp_path):
    names = ["a.b/x.1.jpg", "a_b/x_1.jpg", "a.b/x.1.png", "ünï/ß.jpg", "u" * 90 + "/" + "v" * 90 + ".jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    keys = {item.key for item in open_source(str(tmp_path)).items}
    assert len(keys) == 5 and all(key.isascii() and "." not in key and len(key) <= 80 for key in keys)


def test_tars_keep_labels_and_json(tmp_path, write_tar, encode, photos):
    jpeg = encode(photos[0])
    write_tar(tmp_path / "in" / "a.tar", [
        ("x.jpg", jpeg), ("x.cls", b"3"), ("x.json", b'{"caption": "a face"}'), ("y.png", jpeg), ("z.json", b"{}"),
        ("bad.jpg", jpeg), ("bad.cls", b"three"),
    ])  # fmt: skip
    write_tar(tmp_path / "in" / "b.tar", [("x.jpg", jpeg), ("x.json", b"[1]")])
    samples = read_all(open_source(str(tmp_path / "in")))
    assert samples == {
        "a/x": (jpeg, 3, {"caption": "a face"}),
        "a/y": (jpeg, None, {}),
        "a/z": None,
        "a/bad": None,
        "b/x": (jpeg, None, {"json": [1]}),
    }


class Numbers(torchvision_datasets.VisionDataset):
    classes = ("zero", "one")

    def __init__(self, root, train: bool = True):
        self.images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6 if train else 2)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 2


class Missing(torchvision_datasets.VisionDataset):
    def __init__(self, root):
        raise ModuleNotFoundError("No module named 'lmdb'", name="lmdb")  # as LSUN


def test_torchvision_data_sets(monkeypatch):
    monkeypatch.setattr(torchvision_datasets, "Numbers", Numbers, raising=False)
    source = open_source("torchvision:Numbers:root=x:split=test")
    samples = read_all(source)
    assert [label for _, label, _ in samples.values()] == [0, 1] and source.label_names == ("zero", "one")
    assert len(open_source("torchvision:Numbers:root=x:split=train").items) == 6


@pytest.mark.parametrize(("text", "message"), [
    ("Nothing", "no data set 'Nothing'"),
    ("Numbers:root=x:split=other", "split is 'other'"),
    ("Numbers:root=[", r"root is '\[', which is not valid YAML; quote it"),
    ("Missing:root=x", "No module named 'lmdb'"),
])  # fmt: skip
def test_wrong_torchvision_sources_are_config_errors(text, message, monkeypatch):
    monkeypatch.setattr(torchvision_datasets, "Numbers", Numbers, raising=False)
    monkeypatch.setattr(torchvision_datasets, "Missing", Missing, raising=False)
    with pytest.raises(ConfigError, match=message):
        open_source(f"torchvision:{text}")


@pytest.fixture
def hub_set(tmp_path, monkeypatch, encode, photos):
    """A folder of a Hugging Face data set: four labelled pictures."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    classes = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"picture": datasets.Image(), "kind": classes, "text": datasets.Value("string")})
    pictures = [{"bytes": encode(photo), "path": None} for photo in photos]
    rows = {"picture": pictures, "kind": [0, 1, 1, 0], "text": ["t"] * 4}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    return tmp_path / "set"


def test_hugging_face_data_sets(hub_set, tmp_path, encode, photos):
    (report,) = make_shards(f"hf:{hub_set}:split=train", tmp_path / "out")
    index = open_index(str(tmp_path / "out"))
    order = [int(index.table.key(i)) for i in range(4)]
    assert index.label_names == ("cat", "dog") and index.table.labels.tolist() == [[0, 1, 1, 0][i] for i in order]
    assert [ShardReader(index).read(i).tobytes() for i in range(4)] == [encode(photos[i]) for i in order]
    (again,) = make_shards(f"hf:{hub_set}:split=train", tmp_path / "out")
    assert (report.kept_shards, again.kept_shards) == (0, 1)


def test_wrong_hugging_face_sources_are_named(hub_set):
    for text, image_key, message in (
        (f"hf:{hub_set}/none", None, "none"),
        (f"hf:{hub_set}:name=x", None, "unknown argument 'name'"),
        (f"hf:{hub_set}", "mask", "has no image column 'mask', only picture, kind, text"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(text, image_key=image_key)
        assert isinstance(error.value, ConfigError | DataError)
