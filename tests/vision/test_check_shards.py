"""scripts/check_shards.py on image shards: every kind of damage is reported with its file and sample."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tarfile
from pathlib import Path

import pytest

from moa_vision.shards import ShardSettings, make_shards
from moa_vision.table import SampleTable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command():
    path = ROOT / "scripts" / "check_shards.py"
    spec = importlib.util.spec_from_file_location("check_shards_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def check(command, capsys):
    """check(*arguments) -> exit code and the printed lines."""

    def check(*arguments):
        capsys.readouterr()
        code = command([str(argument) for argument in arguments])
        return code, capsys.readouterr().out.splitlines()

    return check


def relist(packed, file, number=None):
    """Update the manifest entry of a changed file, so that only its content is wrong."""
    manifest = json.loads((packed / "manifest.json").read_text())
    entry = manifest["index"] if number is None else manifest["shards"][number]
    data = (packed / file).read_bytes()
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["bytes"] = sum(shard["bytes"] for shard in manifest["shards"])
    (packed / "manifest.json").write_text(json.dumps(manifest))


def member(path, suffix):
    """Return key, offset and size of a shard's second member with this suffix, from tarfile."""
    with tarfile.open(path) as tar:
        found = [info for info in tar if info.name.endswith(suffix)][1]
    return found.name.split(".")[0], found.offset_data, found.size


def test_an_intact_set_passes(packed, check):
    code, lines = check(packed, "--decode", "--workers", 2)
    assert code == 0 and len(lines) == 2
    assert lines[0].startswith(f"{packed}: 4 shards, 32 images, ") and lines[0].endswith(": no problems")
    assert lines[1].startswith("1 data sets checked in ") and lines[1].endswith(": 0 problems")


def test_every_damaged_file_is_reported(packed, check):
    flipped = packed / "shard-000000.tar"
    data = bytearray(flipped.read_bytes())
    data[700] ^= 1
    flipped.write_bytes(data)
    (packed / "shard-000001.tar").unlink()
    cut = packed / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:-12000])
    index = packed / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1])
    code, lines = check(packed, "--workers", 1)
    assert code == 1
    for name, reasons in (
        ("shard-000000.tar", ["SHA-256 differs"]),
        ("shard-000001.tar", ["No such file"]),
        ("shard-000002.tar", ["bytes, the manifest lists", "cannot read shard"]),
        ("index.safetensors", ["bytes, the manifest lists", "not a sample table"]),
    ):
        here = [line for line in lines if line.startswith(f"{packed}/{name}: ")]
        assert len(here) == len(reasons)
        assert all(reason in line for reason, line in zip(reasons, here, strict=True)), lines
    assert lines[-1].endswith(": 6 problems")


def test_index_and_tar_are_compared_by_sample(packed, check):
    table = SampleTable.from_bytes((packed / "index.safetensors").read_bytes())
    key = [table.key(sample) for sample in range(32)]
    table.offsets[3] += 512
    table.sizes[9] -= 1
    table.labels[17] = 99
    table.key_bytes[table.key_ends[24] : table.key_ends[25]] = ord("x")
    (packed / "index.safetensors").write_bytes(table.to_bytes())
    relist(packed, "index.safetensors")
    code, lines = check(packed)
    assert code == 1 and len(lines) == 7
    for text in (
        f"shard-000000.tar: {key[3]}: offset is ",
        f"shard-000001.tar: {key[9]}: size is ",
        f"shard-000002.tar: {key[17]}: label is ",
        f"shard-000003.tar: {'x' * len(key[25])}: is in the index but not in the tar",
        f"shard-000003.tar: {key[25]}: is in the tar but not in the index",
    ):
        assert any(text in line for line in lines), (text, lines)


def test_odd_members_and_counts_are_reported(packed, check, write_tar):
    write_tar(packed / "shard-000002.tar", [("a.jpg", b"A"), ("a.jpg", b"B"), ("b.cls", b"1"), ("c.jpg", b"")])
    relist(packed, "shard-000002.tar", 2)
    code, lines = check(packed)
    text = "\n".join(lines)
    assert code == 1 and "a.jpg occurs more than once" in text and "b: no image among its members" in text
    assert "has 2 samples, the manifest lists 8" in text
    assert text.count("in the index but not in the tar") == 8 and text.count("in the tar but not in the index") == 2


def test_invalid_manifests_are_one_problem(packed, check):
    (packed / "manifest.json").write_text("[" * 100_000)
    code, lines = check(packed)
    assert code == 1 and f"{packed}/manifest.json: manifest" in lines[0] and "not valid JSON" in lines[0]


def test_wrong_usage_exits_with_2(packed, command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in ([str(tmp_path / "empty")], [], ["--workers", "-3", str(packed)]):
        with pytest.raises(SystemExit) as stop:
            command(arguments)
        assert stop.value.code == 2
    assert "--workers is -3; it must be 1 or above" in capsys.readouterr().err
    assert command([str(tmp_path / "nowhere.tar")]) == 2


def test_remote_sets_are_fetched_checked_and_deleted(shards, tmp_path, check, serve):
    make_shards(str(shards), tmp_path / "set", ShardSettings(samples_per_shard=8), val_fraction=0.25)
    code, lines = check(tmp_path / "set")
    assert code == 0 and [line.split(":")[0] for line in lines[:2]] == [
        f"{tmp_path}/set/{part}" for part in ("train", "val")
    ]
    server = serve(tmp_path / "set" / "val")
    assert check(server.url, "--decode", "--cache-dir", tmp_path / "cache")[0] == 0
    server.faults = {"shard-000000.tar": [404], "index.safetensors": [404]}
    code, lines = check(f"{server.url}/", "--cache-dir", tmp_path / "cache")
    assert code == 1 and not list((tmp_path / "cache").iterdir())
    assert f"{server.url}/index.safetensors: cannot fetch" in lines[0]
    assert f"{server.url}/shard-000000.tar: cannot fetch" in lines[1]


def test_shards_without_a_manifest_entry_are_reported(packed, tmp_path, check):
    (packed / "shard-000009.tar").write_bytes(b"")
    code, lines = check(packed, "--workers", 1)
    assert code == 1 and lines[0].startswith(f"{packed}/shard-000009.tar: ")
    (packed / "manifest.json").unlink()
    code, lines = check(packed)
    assert code == 1 and lines[0].startswith(f"{packed}/manifest.json: is missing although there are shards")
    packed.rename(tmp_path / "val")
    (tmp_path / "source.tar").write_bytes(b"")
    assert check(tmp_path)[1][-2].startswith(f"{tmp_path}/val: "), "tars next to train and val are their source"


def test_tars_without_a_manifest_are_checked(shards, tmp_path, check, serve, write_tar):
    options = ("--decode", "--cache-dir", tmp_path / "cache", "--workers", 1)
    note = "(no manifest.json: sizes, checksums and missing shards cannot be checked)"
    server = serve(shards)
    for name, count in ((shards, 32), (f"{shards}/{{a,c}}.tar", 16), (f"{server.url}/b.tar", 4)):
        code, lines = check(name, *options)
        assert code == 0 and f", {count} images, " in lines[0] and lines[0].endswith(f": no problems {note}")
    key, offset, size = member(shards / "c.tar", ".jpg")
    data = bytearray((shards / "c.tar").read_bytes())
    data[offset : offset + size] = bytes(size)
    (shards / "c.tar").write_bytes(data)
    write_tar(shards / "d.tar", [("x.jpg", b"text"), ("y.json", b"{}")])
    (shards / "e.tar").write_bytes((shards / "e.tar").read_bytes()[:20_000])
    code, lines = check(shards, *options)
    assert code == 1 and lines[-2].endswith(f": 4 problems {note}")
    for start in (
        f"c.tar: {key}: cannot be decoded: ",
        "d.tar: x: cannot be decoded: ",
        "d.tar: y: no image",
        "e.tar: ",
    ):
        assert sum(line.startswith(f"{shards}/{start}") for line in lines) == 1, (start, lines)
    write_tar(tmp_path / "pair.tar", [("x.input.jpg", b"1"), ("x.target.jpg", b"2")])
    assert check(tmp_path / "pair.tar", "--image-key", "input.jpg")[0] == 0
    code, lines = check(tmp_path / "pair.tar")
    assert code == 1 and lines[1] == f"{tmp_path}/pair.tar: has no sample with an image"
