"""The benchmark script as a module, and a run of it as the tables it writes."""

import csv
import importlib
import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def script() -> Iterator[ModuleType]:
    """scripts/benchmark.py, imported."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("benchmark")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def part(script: ModuleType) -> Callable[[str], ModuleType]:
    """part(name) -> a module of scripts/benchmarks."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def tables(script: ModuleType, tmp_path: Path, capsys) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """tables("ffn", "--rounds", 2, ...) -> the lines of every CSV file by its name; Markdown has the same columns."""

    def run(*words: object) -> dict[str, list[dict[str, str]]]:
        capsys.readouterr()
        script.main([*map(str, words), "--out", str(tmp_path)])
        printed = capsys.readouterr().out
        found = {}
        for path in sorted(tmp_path.glob("*.csv")):
            text = path.read_text(encoding="utf-8")
            head, *lines = csv.reader(io.StringIO(text))
            assert f"| {' | '.join(head)} |" in printed, f"{path.name} was not printed"
            assert f"### {path.stem}" in printed
            assert len(set(head)) == len(head), f"{path.name} has two columns of one name: {head}"
            assert all(len(line) == len(head) for line in lines)
            found[path.stem] = list(csv.DictReader(io.StringIO(text)))
        return found

    return run


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory) -> Path:
    """One tar of 66 JPEG images, 40 x 40 pixels, written by tarfile."""
    path = tmp_path_factory.mktemp("shards") / "images.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(66):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return path
