"""Packing: every kind of image, every kind of source, the same bytes however it is run, and runs that break off."""

import gc
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import webdataset
from filelock import FileLock
from PIL import Image, ImageOps
from torchvision import datasets as torchvision_datasets

from moa_train.errors import DataError
from moa_vision import shards as shards_module
from moa_vision.images import ImageError
from moa_vision.index import ShardReader, open_index
from moa_vision.shards import ShardSettings, encode_jpeg, make_shards
from moa_vision.sources import open_source


def pixels(data):
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def by_key(folder):
    index = open_index(str(folder))
    reader = ShardReader(index)
    return {index.table.key(i): reader.read(i).tobytes() for i in range(len(index))}


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def close(a, b, mean=2.5):
    """Whether two images are the same but for JPEG's error."""
    return a.shape == b.shape and np.abs(a - b).mean() < mean


@pytest.fixture
def folder(tmp_path, photos, encode):
    """Two classes of 12 photographs each, as JPEG."""
    root = tmp_path / "photos"
    for number in range(24):
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[number % 4].rotate(number)))
    return root


# --- images of every kind -----------------------------------------------------------------------------------------


CONVERTED = ("cmyk.jpg", "grey.png", "palette.png", "palette.gif", "one-bit.png", "webp.webp", "really-a-png.jpg")


@pytest.fixture
def odd_folder(tmp_path, photos, encode):
    root = tmp_path / "odd"
    root.mkdir()
    photo = photos[0]
    grey16 = np.linspace(0, 65535, 120 * 80).reshape(80, 120).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.uint8(np.arange(photo.width) >= photo.width // 2)[None] * 255).resize(photo.size))
    files = {
        "plain.jpg": encode(photo),
        "grey.jpg": encode(photo.convert("L")),
        "cmyk.jpg": encode(photo.convert("CMYK"), quality=95),
        "turned.jpg": encode(photo, exif=exif, quality=95),
        "grey.png": encode(photo.convert("L"), "PNG"),
        "grey16.png": encode(Image.fromarray(grey16), "PNG"),
        "grey16.tif": encode(Image.fromarray(grey16), "TIFF"),
        "palette.png": encode(photo.quantize(200), "PNG"),
        "palette.gif": encode(photo.quantize(200), "GIF"),
        "alpha.png": encode(alpha, "PNG"),
        "one-bit.png": encode(photo.convert("1"), "PNG"),
        "webp.webp": encode(photo, "WEBP", quality=95),
        "really-a-png.jpg": encode(photo, "PNG"),
        "truncated.jpg": encode(photo)[:-900],
        "truncated.png": encode(photo, "PNG")[:-900],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "float.tif": encode(Image.fromarray(np.random.default_rng(0).random((20, 20)).astype(np.float32)), "TIFF"),
        "readme.txt": b"no image by its name",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def test_every_kind_of_image_is_packed_or_named(odd_folder, tmp_path, photos, encode):
    (report,) = make_shards(str(odd_folder), tmp_path / "out")
    reasons = {Path(entry["source"]).name: entry["reason"] for entry in report.skipped}
    assert set(reasons) == {"truncated.jpg", "truncated.png", "empty.jpg", "text.jpg", "float.tif"}
    assert "truncated" in reasons["truncated.jpg"] and "has 1 channel, not 3" in reasons["float.tif"]
    assert all(reasons.values())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"] == report.skipped and manifest["samples"] == report.samples == 13

    names = {about["source"]: key for key, about in json_by_key(tmp_path / "out").items()}
    packed = {name: by_key(tmp_path / "out")[key] for name, key in names.items()}
    for name in ("plain.jpg", "grey.jpg"):
        assert packed[name] == (odd_folder / name).read_bytes()  # not a byte was touched
    for name in CONVERTED:
        converted = Image.fromarray(pixels(odd_folder / name).astype(np.uint8))
        assert packed[name] == encode(converted, quality=95), name
    with Image.open(odd_folder / "turned.jpg") as turned:
        assert packed["turned.jpg"] == encode(ImageOps.exif_transpose(turned), quality=95)
    photo = np.asarray(photos[0]).astype(int)
    assert close(pixels(packed["turned.jpg"]), np.rot90(photo, -1), 6)
    ramp = np.linspace(0, 255, 120 * 80).reshape(80, 120, 1).repeat(3, 2)
    for name in ("grey16.png", "grey16.tif"):
        assert close(pixels(packed[name]), ramp)
    half = photo.shape[1] // 2
    assert pixels(packed["alpha.png"])[:, : half - 8].min() > 240  # what cannot be seen is white
    assert close(pixels(packed["alpha.png"])[:, half + 8 :], photo[:, half + 8 :], 6)
    assert all(Image.open(io.BytesIO(data)).format == "JPEG" for data in packed.values())


def json_by_key(folder):
    result = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    result[member.name.removesuffix(".json")] = json.loads(tar.extractfile(member).read())
    return result


@pytest.mark.parametrize(("size", "short_side", "expected"), [
    ((300, 200), 100, (150, 100)),
    ((200, 301), 100, (100, 150)),
    ((90, 400), 100, (90, 400)),
    ((100, 100), 100, (100, 100)),
    ((1000, 3), 2, (667, 2)),
])  # fmt: skip
def test_images_get_smaller_never_larger(size, short_side, expected, encode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    jpeg, about = encode_jpeg(encode(image, "PNG"), short_side, 95)
    assert Image.open(io.BytesIO(jpeg)).size == expected
    assert about == {
        "width": expected[0],
        "height": expected[1],
        "original_width": size[0],
        "original_height": size[1],
    }
    resized = image.resize(expected, Image.Resampling.BICUBIC)  # PIL's is antialiased
    assert jpeg == encode(resized, quality=95, subsampling="4:4:4" if min(expected) < 64 else "4:2:0")
    with pytest.raises(ImageError):
        encode_jpeg(b"", short_side, 95)


def test_arrays_keep_their_numbers(tmp_path, photos, encode):
    """Of the size asked for; images of other numbers of channels are skipped and named."""
    root = tmp_path / "arrays"
    root.mkdir()
    rgba = photos[0].convert("RGBA")
    wide = np.arange(19 * 24 * 4).reshape(19, 24, 4)
    np.save(root / "first.npy", np.moveaxis(wide.astype(np.uint16), 2, 0))
    np.save(root / "float.npy", wide.astype(np.float64) / 7)
    np.save(root / "large.npy", np.kron(wide, np.ones((2, 2, 1))).astype(np.uint16))
    np.save(root / "six.npy", np.zeros((20, 24, 6), np.uint8))
    tifffile.imwrite(root / "bands.tif", wide.astype(np.uint8), photometric="minisblack", planarconfig="contig")
    (root / "alpha.png").write_bytes(encode(rgba, "PNG"))
    (root / "photo.jpg").write_bytes(encode(photos[0]))
    (report,) = make_shards(str(root), tmp_path / "out", ShardSettings(short_side=19, channels=4))
    skipped = {entry["source"]: entry["reason"] for entry in report.skipped}
    assert set(skipped) == {"six.npy", "photo.jpg"}
    assert "6 channels, not 4" in skipped["six.npy"] and "3 channels, not 4" in skipped["photo.jpg"]
    packed = {key: np.load(io.BytesIO(data)) for key, data in by_key(tmp_path / "out").items()}
    assert np.array_equal(packed["first"], wide.astype(np.uint16)) and packed["first"].dtype == np.uint16
    assert np.array_equal(packed["float"], (wide / 7).astype(np.float32)) and packed["float"].dtype == np.float32
    assert np.array_equal(packed["bands"], wide.astype(np.uint8)) and packed["bands"].dtype == np.uint8
    about = json_by_key(tmp_path / "out")["alpha"]
    smaller = rgba.resize((about["width"], about["height"]), Image.Resampling.BICUBIC)
    assert min(smaller.size) == 19
    assert packed["large"].dtype == np.uint16 and np.abs(packed["large"][4:-4, 4:-4] - wide[4:-4, 4:-4]).max() <= 1
    assert packed["alpha"].shape == np.asarray(smaller).shape
    assert np.abs(packed["alpha"].astype(int) - smaller).max() <= 1


def test_grey_is_packed_as_grey(tmp_path, photos, encode):
    root = tmp_path / "grey"
    root.mkdir()
    (root / "photo.png").write_bytes(encode(photos[0], "PNG"))
    (root / "kept.jpg").write_bytes(encode(photos[1]))
    make_shards(str(root), tmp_path / "out", ShardSettings(channels=1))
    packed = by_key(tmp_path / "out")
    assert packed["photo"] == encode(photos[0].convert("L"), quality=95) and packed["kept"] == encode(photos[1])


# --- what is written ----------------------------------------------------------------------------------------------


def test_shards_manifest_and_index_agree(folder, tmp_path):
    (report,) = make_shards(str(folder), tmp_path / "out", ShardSettings(samples_per_shard=10))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard["name"] for shard in manifest["shards"]] == [path.name for path in paths]
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 4]
    assert [shard["size"] for shard in manifest["shards"]] == [path.stat().st_size for path in paths]
    assert [shard["sha256"] for shard in manifest["shards"]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    ]
    assert manifest["label_names"] == ["cat", "dog"]
    assert (report.samples, report.shards, report.kept_shards) == (24, 3, 0)
    assert report.bytes == manifest["bytes"] == sum(path.stat().st_size for path in paths)
    index = open_index(str(tmp_path / "out"))
    reader = ShardReader(index)
    for number, path in enumerate(paths):
        with tarfile.open(path) as tar:
            images = [member for member in tar if member.name.endswith(".jpg")]
            first = index.starts[number]
            assert [index.table.key(first + i) for i in range(len(images))] == [m.name[:-4] for m in images]
            for i, member in enumerate(images):
                assert index.table.offsets[first + i] == member.offset_data
                assert reader.read(int(first + i)).tobytes() == tar.extractfile(member).read()


# webdataset leaves the files that it has read to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(folder, tmp_path):
    make_shards(str(folder), tmp_path / "out", ShardSettings(samples_per_shard=10))
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == 24
    for sample in samples:
        original = Path(folder / sample["json"]["source"])
        assert sample["cls"] == ("cat", "dog").index(original.parent.name)
        assert np.array_equal(np.asarray(sample["jpg"]), pixels(original))
        assert (sample["json"]["width"], sample["json"]["height"]) == sample["jpg"].size
    order = [Path(sample["json"]["source"]).stem for sample in samples]
    assert order != sorted(order)  # classes are mixed
    gc.collect()  # here, where it may warn


def test_any_number_of_workers_writes_the_same_bytes(folder, tmp_path):
    settings = ShardSettings(short_side=64, samples_per_shard=7)
    make_shards(str(folder), tmp_path / "one", settings, workers=1)
    make_shards(str(folder), tmp_path / "three", settings, workers=3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    make_shards(str(folder), tmp_path / "other", ShardSettings(short_side=64, samples_per_shard=7, seed=1))
    assert digests(tmp_path / "one").keys() == digests(tmp_path / "other").keys()
    assert by_key(tmp_path / "one") == by_key(tmp_path / "other")
    assert list(by_key(tmp_path / "one")) != list(by_key(tmp_path / "other"))


def test_validation_is_held_out(folder, tmp_path):
    train, val = make_shards(str(folder), tmp_path / "out", val_fraction=0.25)
    assert (train.folder.name, val.folder.name) == ("train", "val")
    assert (train.samples, val.samples) == (18, 6)
    assert not set(by_key(train.folder)) & set(by_key(val.folder))
    assert open_index(str(val.folder)).label_names == ("cat", "dog")
    with pytest.raises(ValueError, match=r"val_fraction is 0\.01: of 24 images it leaves one side empty"):
        make_shards(str(folder), tmp_path / "other", val_fraction=0.01)
    with pytest.raises(ValueError, match="val_fraction is 1"):
        make_shards(str(folder), tmp_path / "other", val_fraction=1)


def test_names_become_keys_that_tars_and_webdataset_take(tmp_path, encode, photos):
    names = ["a.b/x.1.jpg", "a_b/x_1.jpg", "a.b/x.1.png", "ünï/ß.jpg", "u" * 90 + "/" + "v" * 90 + ".jpg"]
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[0], "PNG" if name.endswith("png") else "JPEG"))
    make_shards(str(tmp_path / "in"), tmp_path / "out")
    keys = by_key(tmp_path / "out")
    assert len(keys) == 5 and all(key.isascii() and "." not in key and len(key) <= 80 for key in keys)
    assert {about["source"] for about in json_by_key(tmp_path / "out").values()} == set(names)


# --- runs that break off ------------------------------------------------------------------------------------------


def test_killed_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    settings = ShardSettings(short_side=64, samples_per_shard=5)
    make_shards(str(folder), tmp_path / "whole", settings)
    calls = []

    def killed_at_14(*args):
        calls.append(args)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_jpeg(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "encode_jpeg", killed_at_14)
        arguments = (str(folder), tmp_path / "out", settings)
        run = multiprocessing.get_context("fork").Process(target=make_shards, args=arguments)
        run.start()
        run.join(600)
    assert run.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [
        ".parts", "shard-000000.tar", "shard-000001.tar",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="does not exist"):
        open_index(str(tmp_path / "out" / "manifest.json"))
    assert (tmp_path / "out" / ".parts" / "shard-000002.tar.tmp").exists()  # half a shard, out of sight
    monkeypatch.setattr(shards_module, "encode_jpeg", lambda *args: calls.append(args) or encode_jpeg(*args))
    (report,) = make_shards(str(folder), tmp_path / "out", settings)
    assert report.kept_shards == 2 and len(calls) == 14  # of the 24 the first 10 are not done again
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_workers_of_a_killed_run_end_with_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "encode_jpeg", lambda *args: time.sleep(0.2) or encode_jpeg(*args))
    arguments = {"args": (str(folder), tmp_path / "out", ShardSettings(samples_per_shard=5))}
    run = multiprocessing.get_context("fork").Process(target=make_shards, **arguments, kwargs={"workers": 2})
    run.start()
    while not list(tmp_path.glob("out/.parts/*.tmp")):  # until a worker is at a shard
        assert run.is_alive()
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.join(600)
    _, alive = psutil.wait_procs(workers, timeout=300)
    for worker in alive:
        worker.kill()
    assert workers and not alive


def test_finished_set_is_verified_and_mended(folder, tmp_path):
    settings = ShardSettings(samples_per_shard=5)
    make_shards(str(folder), tmp_path / "out", settings)
    before = digests(tmp_path / "out")
    (report,) = make_shards(str(folder), tmp_path / "out", settings, workers=2)
    assert (report.kept_shards, report.shards) == (5, 5) and digests(tmp_path / "out") == before
    spoiled = bytearray((tmp_path / "out" / "shard-000001.tar").read_bytes())
    spoiled[3000] ^= 255
    (tmp_path / "out" / "shard-000001.tar").write_bytes(spoiled)
    (tmp_path / "out" / "shard-000003.tar").unlink()
    (report,) = make_shards(str(folder), tmp_path / "out", settings)
    assert report.kept_shards == 3 and digests(tmp_path / "out") == before


def test_changed_sources_are_packed_again(folder, tmp_path, encode, photos):
    settings = ShardSettings(samples_per_shard=5)
    make_shards(str(folder), tmp_path / "out", settings)
    (folder / "cat" / "00.jpg").write_bytes(encode(photos[3], quality=50))
    (report,) = make_shards(str(folder), tmp_path / "out", settings)
    assert report.kept_shards == 4
    assert encode(photos[3], quality=50) in by_key(tmp_path / "out").values()
    for path in list((folder / "dog").iterdir()):
        path.unlink()
    (report,) = make_shards(str(folder), tmp_path / "out", settings)
    assert (report.shards, report.samples) == (3, 12)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3  # those of the larger set are gone


def test_folders_of_others_are_left_alone(folder, tmp_path):
    make_shards(str(folder), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds a data set made with .*'short_side': None"):
        make_shards(str(folder), tmp_path / "out", ShardSettings(short_side=64))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="tars that no manifest lists"):
        make_shards(str(folder), tmp_path / "foreign")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="not one of ours"):
        make_shards(str(folder), tmp_path / "web")
    (tmp_path / "busy" / ".parts").mkdir(parents=True)
    with FileLock(tmp_path / "busy" / ".parts" / "lock"), pytest.raises(ValueError, match="being written by another"):
        make_shards(str(folder), tmp_path / "busy")


@pytest.mark.parametrize("field", ["short_side", "quality", "samples_per_shard"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0; allowed"):
        ShardSettings(**{field: 0})


# --- sources ------------------------------------------------------------------------------------------------------


def test_tars_keep_their_labels_and_json(tmp_path, write_tar, encode, photos):
    jpeg = encode(photos[0])
    write_tar(
        tmp_path / "in" / "a.tar",
        [
            ("x.jpg", jpeg),
            ("x.cls", b"3"),
            ("x.json", b'{"caption": "a face", "width": 1}'),
            ("y.png", encode(photos[1], "PNG")),
            ("z.json", b"{}"),
            ("bad.jpg", jpeg),
            ("bad.cls", b"three"),
        ],
    )
    write_tar(tmp_path / "in" / "b.tar", [("x.jpg", encode(photos[2])), ("x.json", b"[1]")])
    (report,) = make_shards(str(tmp_path / "in"), tmp_path / "out")
    assert {entry["source"] for entry in report.skipped} == {"a/z", "a/bad"}
    about = {entry["source"]: entry for entry in json_by_key(tmp_path / "out").values()}
    assert about["a/x"]["caption"] == "a face" and about["a/x"]["width"] == photos[0].width
    assert about["b/x"]["json"] == [1]
    index = open_index(str(tmp_path / "out"))
    labels = dict(zip(by_key(tmp_path / "out"), index.table.labels.tolist(), strict=True))
    assert labels.pop("x") == 3 and set(labels.values()) == {-1} and len(labels) == 2
    assert by_key(tmp_path / "out")["x"] == jpeg
    (again,) = make_shards(str(tmp_path / "out"), tmp_path / "again", ShardSettings(seed=5))  # from our own shards
    assert by_key(again.folder) == by_key(tmp_path / "out")


def test_the_image_of_a_tar_can_be_chosen(tmp_path, write_tar, encode, photos):
    pair = [encode(photo) for photo in photos[:2]]
    write_tar(tmp_path / "in.tar", [("x.input.jpg", pair[0]), ("x.target.jpg", pair[1])])
    with pytest.raises(DataError, match=r"several images \(input.jpg, target.jpg\); choose one with .*--image-key"):
        make_shards(str(tmp_path / "in.tar"), tmp_path / "none")
    make_shards(str(tmp_path / "in.tar"), tmp_path / "out", image_key="target.jpg")
    assert [*by_key(tmp_path / "out").values()] == [pair[1]]


def test_torchvision_data_sets(tmp_path, monkeypatch, encode):
    (report,) = make_shards("torchvision:FakeData:size=7:image_size=[3, 40, 60]:num_classes=5", tmp_path / "out")
    assert report.samples == 7
    fake = torchvision_datasets.FakeData(size=7, image_size=(3, 40, 60), num_classes=5)
    packed = by_key(tmp_path / "out")
    labels = dict(zip(packed, open_index(str(tmp_path / "out")).table.labels.tolist(), strict=True))
    for i in range(7):
        image, label = fake[i]
        assert packed[f"{i:08d}"] == encode(image, quality=95, subsampling="4:4:4")
        assert labels[f"{i:08d}"] == int(label)

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
            raise ModuleNotFoundError("No module named 'lmdb'", name="lmdb")  # as LSUN does

    monkeypatch.setattr(torchvision_datasets, "Numbers", Numbers, raising=False)
    monkeypatch.setattr(torchvision_datasets, "Missing", Missing, raising=False)
    assert len(open_source("torchvision:Numbers:root=x:split=train").items) == 6
    source = open_source("torchvision:Numbers:root=x:split=test")
    assert len(source.items) == 2 and source.label_names == ("zero", "one")
    for text, message in (
        ("torchvision:Nothing", "no data set 'Nothing'"),
        ("torchvision:Numbers:root=x:split=other", "split is 'other'"),
        ("torchvision:Numbers:size=3", "size"),
        ("torchvision:Numbers:root", "allowed is KIND:NAME"),
        ("torchvision:Numbers:root=[", r"root is '\[', which is no YAML; put it in quotes"),
        ("torchvision:Numbers:root=!!timestamp x", "root is '!!timestamp x', which is no YAML"),
        ("torchvision:Numbers:root=!!int x", "root is '!!int x', which is no YAML"),
        ("torchvision:Missing:root=x", "No module named 'lmdb'; install it, as by pip install lmdb"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(text)


def test_hugging_face_data_sets(tmp_path, monkeypatch, encode, photos):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    jpegs = [encode(photo) for photo in photos]
    rows = {
        "picture": [{"bytes": jpeg, "path": None} for jpeg in jpegs],
        "kind": [0, 1, 1, 0],
        "text": ["t"] * 4,
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    (report,) = make_shards(f"hf:{tmp_path}/set:split=train", tmp_path / "out")
    assert report.samples == 4 and not report.skipped
    packed = by_key(tmp_path / "out")
    assert [packed[f"{i:08d}"] for i in range(4)] == jpegs
    index = open_index(str(tmp_path / "out"))
    assert index.label_names == ("cat", "dog")
    assert dict(zip(packed, index.table.labels.tolist(), strict=True)) == {
        "00000000": 0, "00000001": 1, "00000002": 1, "00000003": 0,
    }  # fmt: skip
    (report,) = make_shards(f"hf:{tmp_path}/set:split=train", tmp_path / "out")
    assert report.kept_shards == 1
    assert len(open_source(f"hf:{tmp_path}/set", image_key="picture").items) == 4
    with pytest.raises(ValueError, match="has no image column 'mask', only picture, kind, text"):
        open_source(f"hf:{tmp_path}/set", image_key="mask")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "set" / "train.parquet")
    for text, message in (
        (f"hf:{tmp_path}/none", "none"),
        (f"hf:{tmp_path}/set:name=x", "'name' is unknown"),
        (f"hf:{tmp_path}/set", "has no image column, only text"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(text)


def test_no_file_is_left_out_in_silence(tmp_path, encode, photos, caplog):
    files = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.avif": "AVIF", "d": "PNG", "e.pgm": "PPM", "f.1": "PNG"}
    for name, form in files.items():
        (tmp_path / name).write_bytes(encode(photos[0], form))
    for name in ("README", "notes.txt", "more.txt"):
        (tmp_path / name).write_text("no image")
    (report,) = make_shards(str(tmp_path), tmp_path / "out")
    assert (report.samples, report.skipped) == (5, [])
    assert "4 files below" in caplog.text and ".txt (2), " in caplog.text
    assert ".1 (1)" in caplog.text and "no suffix (1)" in caplog.text


@pytest.mark.parametrize("source", ["nowhere", "nowhere/{0..3}.tar", "nowhere/*.tar", "zip:nowhere"])
def test_a_missing_source_is_answered_with_all_that_is_allowed(source, command, tmp_path, capsys):
    assert command(["--source", source, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "nowhere" in told and "allowed are a folder of images, tars by path, brace or glob, torchvision:" in told


@pytest.mark.parametrize("folder", ["photos", "photos/cats", "."])
def test_images_given_as_shards_are_answered_with_make_shards(folder, tmp_path, monkeypatch):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "a.JPEG").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    hint = f"pack images first: python scripts/make_shards.py --source {folder} --out"
    with pytest.raises(ValueError, match=re.escape(hint)):
        open_index(folder)
    with pytest.raises(ValueError, match=r"a\.JPEG is an image, no shard; pack .* --source photos/cats "):
        open_index("photos/**/*.JPEG")


def test_a_log_shows_progress(command, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moa_train.progress.LINE_EVERY_S", 0.0)
    options = ["--samples-per-shard", "10", "--workers", "1"]
    assert command(["--source", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"packing {folder} into {tmp_path}/out with 1 processes"
    assert [line.split(", ")[0] for line in told[1:-1]] == [f"{tmp_path}/out: {n}/24" for n in (0, 10, 20)]


def test_links_that_go_round_are_followed_once(tmp_path, monkeypatch):
    for name in ("cats/a.jpg", "cats/deep/b.jpg", "dogs/c.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    links = {"self": ".", "again": ".", "cats/deep/up": "../..", "dogs/cats": "../cats", "cats/dogs": "../dogs"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    monkeypatch.chdir(tmp_path / "in")
    expected = [
        "cats/a.jpg",
        "cats/deep/b.jpg",
        "cats/dogs/c.jpg",
        "dogs/c.jpg",
        "dogs/cats/a.jpg",
        "dogs/cats/deep/b.jpg",
    ]
    for folder in (".", f"{tmp_path}/in", f"{tmp_path}/in/", f"{tmp_path}/in/self"):
        source = open_source(folder)
        assert [item.name for item in source.items] == expected
        assert source.label_names == ("cats", "dogs")


def test_sources_without_images_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="holds no image"):
        make_shards(str(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in" / "a.jpg").write_bytes(b"nothing either")
    with pytest.raises(DataError, match=r"none of the 1 images.*a\.jpg"):
        make_shards(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    path = Path(__file__).parents[2] / "scripts" / "make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command(command, odd_folder, tmp_path, capsys):
    arguments = ["--source", str(odd_folder), "--out", str(tmp_path / "out"), "--workers", "2", "--short-side", "64"]
    assert command(arguments) == 0
    assert "13 images in 1 shards (0 kept)" in (text := capsys.readouterr().out)
    assert "skipped truncated.jpg: image file is truncated" in text
    assert command([*arguments, "--quality", "0"]) == 1
    assert "quality is 0; allowed: 1 to 100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "torchvision:NAME" in capsys.readouterr().out
