"""A benchmark's command line as the tables it writes."""

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.__main__ import main


@pytest.fixture
def tables(tmp_path: Path, capsys) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """tables("ffn", "--rounds", 2, ...) -> rows of each CSV file by its name; Markdown has the same columns."""

    def run(*words: object) -> dict[str, list[dict[str, str]]]:
        capsys.readouterr()
        main([*map(str, words), "--out", str(tmp_path)])
        printed = capsys.readouterr().out
        found = {}
        for path in sorted(tmp_path.glob("*.csv")):
            text = path.read_text(encoding="utf-8")
            heading = next(csv.reader(io.StringIO(text)))
            assert f"### {path.stem}" in printed and f"| {' | '.join(heading)} |" in printed
            assert len(set(heading)) == len(heading), f"{path.name} has two columns of one name: {heading}"
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
