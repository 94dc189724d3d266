"""Photographs, tars written by tarfile, and a cache folder of the test's own."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage.data
from PIL import Image


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test caches outlives it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    return tmp_path / "cache-home"


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Four photographs of different shapes, short side 128 or so."""
    arrays = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    images = [Image.fromarray(array) for array in arrays]
    for image, side in zip(images, (128, 120, 140, 101), strict=True):
        image.thumbnail((10_000, side), Image.Resampling.BICUBIC)
    return images


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(image, format="JPEG", **options) -> bytes, by PIL."""

    def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """write_tar(path, [(member name, bytes), ...], mode="w") -> path, by tarfile."""

    def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write_tar


@pytest.fixture
def shards(tmp_path: Path, photos, encode, write_tar) -> Path:
    """A folder of 5 tars with 9, 4, 7, 1 and 11 JPEG photographs each, labelled; keys a0, a1, ..., e10."""
    folder = tmp_path / "shards"
    number = 0
    for letter, count in zip("abcde", (9, 4, 7, 1, 11), strict=True):
        members = []
        for i in range(count):
            photo = photos[number % len(photos)].rotate(number, Image.Resampling.BILINEAR)
            members += [(f"{letter}{i}.jpg", encode(photo)), (f"{letter}{i}.cls", str(number).encode())]
            number += 1
        write_tar(folder / f"{letter}.tar", members)
    return folder
