"""scripts/check_shards.py on image shards: every kind of damage, told with its file and its sample."""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from moa_train.checks import Plan, run_checks
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
def packed(shards, tmp_path):
    """Our own data set of the photographs: 4 shards of 8."""
    make_shards(str(shards), tmp_path / "packed", ShardSettings(samples_per_shard=8))
    return tmp_path / "packed"


@pytest.fixture
def lines(command, capsys):
    """lines(*arguments) -> exit code and what was printed, line by line."""

    def lines(*arguments):
        capsys.readouterr()
        code = command([str(argument) for argument in arguments])
        return code, capsys.readouterr().out.splitlines()

    return lines


def rewrite(packed, change, *, number=1, listed=True):
    """Changes a shard's bytes; `listed`: the manifest is told, so that only its content is wrong."""
    path = packed / f"shard-{number:06d}.tar"
    data = change(bytearray(path.read_bytes()))
    path.write_bytes(data)
    if listed:
        manifest = json.loads((packed / "manifest.json").read_text())
        manifest["shards"][number] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (packed / "manifest.json").write_text(json.dumps(manifest))


def member(packed, number, suffix):
    """The key, offset and size of a shard's second member with this suffix, as tarfile tells."""
    with tarfile.open(packed / f"shard-{number:06d}.tar") as tar:
        found = [info for info in tar if info.name.endswith(suffix)][1]
    return found.name.split(".")[0], found.offset_data, found.size


def spoil(data, offset, new):
    data[offset : offset + len(new)] = new
    return data


@pytest.mark.parametrize("workers", [1, 2], ids=["one process", "two processes"])
def test_what_is_whole_passes(packed, lines, workers):
    code, told = lines(packed, "--decode", "--workers", workers)
    assert code == 0
    assert told[0].startswith(f"{packed}: 4 shards, 32 images, ") and told[0].endswith("all is well")
    assert told[-1].startswith("1 data sets checked in ") and told[-1].endswith(": 0 problems")


def test_every_damaged_file_is_told(packed, lines):
    """Not only the first: a byte, a missing file, a cut one, one without a tar's form, and the index."""
    rewrite(packed, lambda data: spoil(data, 700, bytes([data[700] ^ 1])), number=0, listed=False)
    (packed / "shard-000001.tar").unlink()
    rewrite(packed, lambda data: data[:-12000], number=2, listed=False)
    (packed / "shard-000003.tar").write_bytes(b"no tar" * 500)
    index = packed / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1])
    code, told = lines(packed, "--workers", 1)
    assert code == 1
    for name, reason in (
        ("shard-000000.tar", "its SHA-256 is not the manifest's"),
        ("shard-000001.tar", "No such file"),
        ("shard-000002.tar", "bytes, the manifest says"),
        ("shard-000002.tar", "truncated inside|damaged at byte|unexpected end"),
        ("shard-000003.tar", "cannot read shard"),
        ("index.safetensors", "bytes, the manifest says"),
        ("index.safetensors", "no sample table"),
    ):
        here = [line for line in told if line.startswith(f"{packed}/{name}: ")]
        assert any(part in line for line in here for part in reason.split("|")), (name, reason, told)
    problems = int(told[-1].split(": ")[-1].split(" ")[0])
    assert problems == len(told) - 2, "a line for each, one for the set, one for all"


def test_index_and_tar_are_compared_sample_by_sample(packed, lines):
    table, _ = SampleTable.from_bytes((packed / "index.safetensors").read_bytes())
    key = [table.key(sample) for sample in range(32)]
    table.offsets[3] += 512
    table.sizes[9] -= 1
    table.labels[17] = 5
    table.key_bytes[table.key_ends[24] : table.key_ends[25]] = ord("x")
    data = table.to_bytes()
    (packed / "index.safetensors").write_bytes(data)
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["index"] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (packed / "manifest.json").write_text(json.dumps(manifest))
    code, told = lines(packed)
    assert code == 1
    expected = [
        f"shard-000000.tar: {key[3]}: its offset is ",
        f"shard-000001.tar: {key[9]}: its size is ",
        f"shard-000002.tar: {key[17]}: its label is ",
        f"shard-000003.tar: {'x' * len(key[25])}: the index lists it, the tar lacks it",
        f"shard-000003.tar: {key[25]}: the index does not list it",
    ]
    assert len(told) == len(expected) + 2
    assert all(any(text in line for line in told) for text in expected), told


def test_images_are_decoded_if_asked(packed, lines):
    key, offset, size = member(packed, 1, ".jpg")
    rewrite(packed, lambda data: spoil(data, offset, bytes(size)))
    assert lines(packed)[0] == 0
    code, told = lines(packed, "--decode")
    assert code == 1 and len(told) == 3
    assert f"{packed}/shard-000001.tar: {key}: cannot be decoded: " in told[0]


def test_odd_members_and_counts_are_told(packed, lines, write_tar):
    write_tar(packed / "shard-000002.tar", [("a.jpg", b"A"), ("a.jpg", b"B"), ("b.cls", b"1"), ("c.jpg", b"")])
    rewrite(packed, lambda data: data, number=2)
    code, told = lines(packed)
    text = "\n".join(told)
    assert code == 1
    for reason in ("a.jpg (2): a.jpg occurs twice", "b: no image among its members", "has 2 samples, the manifest 8"):
        assert f"shard-000002.tar: {reason}" in text, text
    assert text.count("the index lists it, the tar lacks it") == 8
    assert text.count("the index does not list it") == 2


def test_manifest_that_is_none(packed, lines, tmp_path, capsys, command):
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"].append(manifest["shards"][0])
    (packed / "manifest.json").write_text(json.dumps(manifest))
    code, told = lines(packed)
    assert code == 1 and any("manifest.json: shard-000000.tar: is listed twice" in line for line in told)
    (packed / "manifest.json").write_text("[" * 100_000)
    code, told = lines(packed)
    assert code == 1 and "manifest.json: it is nested too deeply" in told[0]
    for arguments in ([str(tmp_path)], [], *(["--workers", number, str(packed)] for number in ("two", "0", "-3"))):
        with pytest.raises(SystemExit) as stop:
            command(arguments)
        assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "usage: " in told and "--workers is -3; allowed: 1 or more" in told
    with pytest.raises(ValueError, match="workers is 0; allowed: 1 or more"):
        list(run_checks(Plan("a", "images", 0, [], []), 0))


def test_totals_are_those_of_the_shards(packed, lines):
    manifest = json.loads((packed / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in packed.glob("*.tar"))
    (packed / "manifest.json").write_text(json.dumps(manifest | {"samples": 999, "bytes": -1}))
    code, told = lines(packed, "--workers", 1)
    assert code == 1 and told[:2] == [
        f'{packed}/manifest.json: "samples" is 999, its shards come to 32',
        f'{packed}/manifest.json: "bytes" is -1, its shards come to {size}',
    ]
    assert len(told) == 4


def test_who_stops_reading_is_no_failure_of_ours(packed):
    """`check_shards.py ... | head -1`: no traceback, neither of a line nor of what is flushed at the end."""
    (packed / "manifest.json").unlink()
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "scripts/check_shards.py", str(packed), "--workers", "1"]
    with os.fdopen(writer, "wb") as closed:
        found = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (141, "")


def test_train_and_val_below_a_folder_and_remote_sets(shards, tmp_path, lines, serve):
    make_shards(str(shards), tmp_path / "set", ShardSettings(samples_per_shard=8), val_fraction=0.25)
    code, told = lines(tmp_path / "set")
    assert code == 0 and [line.split(":")[0] for line in told[:2]] == [
        f"{tmp_path}/set/{part}" for part in ("train", "val")
    ]
    server = serve(tmp_path / "set" / "val")
    assert lines(server.url, "--decode", "--cache-dir", tmp_path / "cache")[0] == 0
    assert not list((tmp_path / "cache").iterdir()), "nothing is kept"
    server.faults["shard-000000.tar"] = [404] * 9
    code, told = lines(f"{server.url}/", "--cache-dir", tmp_path / "cache")
    assert code == 1 and f"{server.url}/shard-000000.tar: cannot fetch" in told[0], "the server's, not a copy"
    server.faults = {"index.safetensors": [404] * 9}
    code, told = lines(server.url, "--cache-dir", tmp_path / "cache")
    assert code == 1 and f"{server.url}/index.safetensors: cannot fetch" in told[0]
    assert not list((tmp_path / "cache").iterdir())


def test_shards_that_no_manifest_lists_are_told(packed, tmp_path, lines):
    """A set whose manifest did not come with it, and files that do not belong to their set."""
    names = ("more.tar.gz", "shard-000009.safetensors", "shard-000009.tar")
    train, val = tmp_path / "set" / "train", tmp_path / "set" / "val"
    train.mkdir(parents=True)
    for name in names:
        (train / name).write_bytes(b"")
        if name.endswith(".tar"):
            (train / "index.safetensors").write_bytes(b"")
        code, told = lines(train)
        if name == "more.tar.gz":  # none of ours
            assert code == 1 and told[0].startswith(f"{train}/{name}: cannot read shard")
        else:
            assert code == 1 and told[0].startswith(f"{train}/manifest.json: is missing, but there are shards; run")
            assert told[1] == f"{train}: 0 shards, 0 samples, 0.0 MiB: 1 problem"
        (train / name).rename(tmp_path / name)
    (train / "index.safetensors").unlink()
    packed.rename(val)
    (tmp_path / "set" / "source.tar").write_bytes(b"of both")
    assert lines(tmp_path / "set", "--workers", 1)[0] == 0, "an empty folder is no data set"
    (train / "a.tar").write_bytes(b"")
    code, told = lines(tmp_path / "set", "--workers", 1)
    assert code == 1 and [line.split(":")[0] for line in told[:3]] == [f"{train}/a.tar", f"{train}", f"{val}"]
    for name in names:
        (tmp_path / name).rename(val / name)
    code, told = lines(val, "--workers", 1)
    assert code == 1 and len(told) == 5
    for name, line in zip(names, told, strict=False):
        assert line.startswith(f"{val}/{name}: its manifest does not list it; make or copy")


def test_tars_without_a_manifest_are_checked_as_far_as_can_be(shards, tmp_path, lines, serve, write_tar):
    """Those of others: by folder, brace and address, compressed ones too; tarfile and PIL say what is right."""
    options = ("--decode", "--cache-dir", tmp_path / "cache", "--workers", 1)
    note = "(no manifest.json: sizes, checksums and missing shards cannot be checked)"
    (shards / "b.tar.gz").write_bytes(gzip.compress((shards / "b.tar").read_bytes()))
    (shards / "b.tar").unlink()
    server = serve(shards)
    for name, count in ((shards, 32), (f"{shards}/{{a,c}}.tar", 16), (f"{server.url}/b.tar.gz", 4)):
        code, told = lines(name, *options)
        assert code == 0 and f", {count} images, " in told[0] and told[0].endswith(f": all is well {note}")
    assert not list((tmp_path / "cache").iterdir()), "nothing is kept"
    data = (shards / "c.tar").read_bytes()
    with tarfile.open(shards / "c.tar") as tar:
        cut = tar.getmembers()[4].offset_data + 100
    (shards / "c.tar").write_bytes(data[:cut] + bytes(2000) + data[cut + 2000 :])
    write_tar(shards / "d.tar", [("x.jpg", b"no image"), ("y.json", b"{}"), ("z.cls", b"one")])
    (shards / "e.tar").write_bytes((shards / "e.tar").read_bytes()[:20_000])
    code, told = lines(shards, *options)
    assert code == 1 and told[-2].endswith(f": 5 problems {note}")
    for start in (
        f"{shards}/c.tar: c2: cannot be decoded: ",
        f"{shards}/d.tar: x: cannot be decoded: ",
        f"{shards}/d.tar: y: no image among its members (json)",
        f"{shards}/d.tar: z: no image among its members (cls)",
        f"{shards}/e.tar: ",
    ):
        assert sum(line.startswith(start) for line in told) == 1, (start, told)
    write_tar(tmp_path / "pair.tar", [("x.input.jpg", b"no image"), ("x.jpg", b"nor this")])
    code, told = lines(tmp_path / "pair.tar", "--image-key", "input.jpg")
    assert code == 0 and ", 1 images, " in told[0]
    code, told = lines(tmp_path / "pair.tar", "--image-key", "png")
    assert code == 1 and told[1] == f"{tmp_path}/pair.tar: holds no sample with an image"
    assert lines(tmp_path / "nowhere.tar")[0] == 2


def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("--decode", "--workers", "Exit codes", "data/mine"):
        assert words in text
