"""Packing: deterministic shards that webdataset reads, resumed after interruptions."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from moa_train.errors import ConfigError, DataError
from moa_vision import shards as shards_module
from moa_vision.encoding import ShardSettings, encode_image
from moa_vision.index import ShardReader, open_index
from moa_vision.shards import make_shards

FORK = multiprocessing.get_context("fork")


def by_key(folder):
    index = open_index(str(folder))
    reader = ShardReader(index)
    return {index.table.key(i): reader.read(i).tobytes() for i in range(len(index))}


def digests(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def folder(tmp_path, photos, encode):
    """Two classes of 12 JPEG photographs each."""
    root = tmp_path / "photos"
    for number in range(24):
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[number % 4].rotate(number)))
    return root


# --- what is written ----------------------------------------------------------------------------------------------


def test_manifest_and_index_agree_with_the_tars(folder, tmp_path):
    (report,) = make_shards(str(folder), tmp_path / "out", ShardSettings(samples_per_shard=10))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert [(entry["name"], entry["samples"], entry["bytes"], entry["sha256"]) for entry in manifest["shards"]] == [
        (path.name, samples, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path, samples in zip(paths, (10, 10, 4), strict=True)
    ]
    assert (report.samples, report.shards, report.kept_shards, report.bytes) == (24, 3, 0, manifest["bytes"])
    assert open_index(str(tmp_path / "out")).label_names == ("cat", "dog")


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
        assert np.array_equal(np.asarray(sample["jpg"]), Image.open(original).convert("RGB"))
        assert (sample["json"]["width"], sample["json"]["height"]) == sample["jpg"].size
    order = [Path(sample["json"]["source"]).stem for sample in samples]
    assert order != sorted(order), "shuffled"
    gc.collect()  # here, where it may warn


def test_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    for name, seed, workers in (("one", 0, 1), ("three", 0, 3), ("other", 1, 1)):
        settings = ShardSettings(short_side=64, samples_per_shard=7, seed=seed)
        make_shards(str(folder), tmp_path / name, settings, workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    one, other = by_key(tmp_path / "one"), by_key(tmp_path / "other")
    assert one == other and list(one) != list(other), "the seed changes the order only"


def test_packed_bytes_have_not_changed(tmp_path):
    """Digests recorded at commit 11c331d."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        pixels = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3) + number
        np.save(tmp_path / "in" / f"{number}.npy", pixels)
    make_shards(str(tmp_path / "in"), tmp_path / "out", ShardSettings(samples_per_shard=3, seed=2))
    assert {name: digest[:16] for name, digest in digests(tmp_path / "out").items() if name != "manifest.json"} == {
        "index.safetensors": "0a1672b51a249069",
        "shard-000000.tar": "a44ef91166157205",
        "shard-000001.tar": "0d762184389282e3",
    }


def test_validation_set_is_held_out(folder, tmp_path):
    train, val = make_shards(str(folder), tmp_path / "out", val_fraction=0.25)
    assert (train.folder.name, train.samples, val.folder.name, val.samples) == ("train", 18, "val", 6)
    assert not set(by_key(train.folder)) & set(by_key(val.folder))
    with pytest.raises(ConfigError, match="leaves one side of 24 images empty"):
        make_shards(str(folder), tmp_path / "other", val_fraction=0.01)


def test_unusable_images_are_skipped_and_listed(folder, tmp_path):
    (folder / "cat" / "00.jpg").write_bytes((folder / "cat" / "00.jpg").read_bytes()[:-900])
    (folder / "dog" / "01.jpg").write_bytes(b"text")
    (report,) = make_shards(str(folder), tmp_path / "out", ShardSettings(samples_per_shard=5))
    reasons = {image["source"]: image["reason"] for image in report.skipped}
    assert reasons.keys() == {"cat/00.jpg", "dog/01.jpg"} and "truncated" in reasons["cat/00.jpg"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [image for entry in manifest["shards"] for image in entry["skipped"]] == report.skipped
    assert manifest["samples"] == report.samples == 22


def test_a_set_without_a_usable_image_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match=r"none of the 1 images.*a\.jpg"):
        make_shards(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_packed_sets_can_be_packed_again(folder, tmp_path):
    make_shards(str(folder), tmp_path / "out", ShardSettings(samples_per_shard=10))
    (again,) = make_shards(str(tmp_path / "out"), tmp_path / "again", ShardSettings(seed=5))
    assert by_key(again.folder) == by_key(tmp_path / "out")
    assert open_index(str(again.folder)).label_names == ("cat", "dog")


# --- interrupted runs ---------------------------------------------------------------------------------------------


def test_a_killed_run_is_resumed(folder, tmp_path, monkeypatch):
    settings = ShardSettings(short_side=64, samples_per_shard=5)
    make_shards(str(folder), tmp_path / "whole", settings)
    calls = []

    def killed_at_14(*args):
        calls.append(args)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_image(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "encode_image", killed_at_14)
        run = FORK.Process(target=make_shards, args=(str(folder), tmp_path / "out", settings))
        run.start()
        run.join(600)
    assert run.exitcode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".parts", "shard-000000.tar", "shard-000001.tar"]
    monkeypatch.setattr(shards_module, "encode_image", lambda *args: calls.append(args) or encode_image(*args))
    (report,) = make_shards(str(folder), tmp_path / "out", settings)
    assert report.kept_shards == 2 and len(calls) == 14, "of the 24 the first 10 are not repeated"
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_finished_set_is_verified_and_repaired(folder, tmp_path, encode, photos):
    settings, out = ShardSettings(samples_per_shard=5), tmp_path / "out"
    make_shards(str(folder), out, settings)
    before = digests(out)
    (report,) = make_shards(str(folder), out, settings, workers=2)
    assert (report.kept_shards, report.shards) == (5, 5) and digests(out) == before
    spoiled = bytearray((out / "shard-000001.tar").read_bytes())
    spoiled[3000] ^= 255
    (out / "shard-000001.tar").write_bytes(spoiled)
    (out / "shard-000003.tar").unlink()
    (report,) = make_shards(str(folder), out, settings)
    assert report.kept_shards == 3 and digests(out) == before
    (folder / "cat" / "00.jpg").write_bytes(encode(photos[3], quality=50))
    (report,) = make_shards(str(folder), out, settings)
    assert report.kept_shards == 4 and encode(photos[3], quality=50) in by_key(out).values()
    shutil.rmtree(folder / "dog")
    (report,) = make_shards(str(folder), out, settings)
    assert report.shards == len(list(out.glob("*.tar"))) == 3, "shards of the larger set are removed"


def test_folders_with_other_content_are_not_overwritten(folder, tmp_path):
    make_shards(str(folder), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"was packed with .*'short_side': None"):
        make_shards(str(folder), tmp_path / "out", ShardSettings(short_side=64))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="has tars but no manifest"):
        make_shards(str(folder), tmp_path / "foreign")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    path = Path(__file__).parents[2] / "scripts" / "make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_prints_progress_and_skipped_images(command, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moa_train.progress.LINE_EVERY_S", 0.0)
    (folder / "cat" / "00.jpg").write_bytes(b"text")
    arguments = ["--source", str(folder), "--out", str(tmp_path / "out"), "--samples-per-shard", "10", "--workers", "1"]
    assert command(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"packing {folder} into {tmp_path}/out with 1 processes"
    assert f"{tmp_path}/out: 10/24" in [line.split(", ")[0] for line in lines]
    assert "23 images in 3 shards (0 kept)" in lines[-2]
    assert lines[-1].startswith("  skipped cat/00.jpg: not an image")


def test_command_reports_wrong_options_in_one_line(command, folder, tmp_path, capsys):
    assert command(["--source", str(folder), "--out", str(tmp_path), "--quality", "0"]) == 2
    assert capsys.readouterr().err == "make_shards: error: quality is 0; it must be 1 to 100\n"
