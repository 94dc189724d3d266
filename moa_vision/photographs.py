"""Data of the demo: photographs from the scikit-image and scikit-learn packages, packed as shards.

    python -m moa_vision.photographs --out data/photographs

Training shards hold whole photographs, of which the loader takes random crops. Validation shards hold fixed crops of
other photographs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from moa_train.errors import DataError
from moa_vision.images import FORMATS, to_mode
from moa_vision.shards import Report, ShardSettings, make_shards

FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
"""Folder of the photographs in each package."""

TRAIN = (
    "skimage/astronaut.png",
    "skimage/brick.png",
    "skimage/camera.png",
    "skimage/cell.png",
    "skimage/clock_motion.png",
    "skimage/coffee.png",
    "skimage/grass.png",
    "skimage/gravel.png",
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/moon.png",
    "skimage/motorcycle_left.png",
    "skimage/motorcycle_right.png",
    "skimage/retina.jpg",
    "sklearn/china.jpg",
)
VAL = ("skimage/chelsea.png", "skimage/coins.png", "skimage/rocket.jpg", "sklearn/flower.jpg")
"""Held-out photographs, none of whose scenes is in `TRAIN`."""

SHORT_SIDE = 320
"""Maximum short side of a training photograph in the shards, in pixels."""

COPIES = 32
"""Samples per training photograph; an epoch needs at least one batch of samples."""

VAL_CROPS, VAL_PIXELS, VAL_SMALLEST_SIDE = 64, 96, 72
"""Validation crops per photograph, their size in the shards and their minimum side, both in pixels."""

SEED = 105
"""Seed of the sample order in the shards."""


def photograph_file(name: str) -> Path:
    """Return the file of one photograph of `TRAIN` or `VAL`.

    Raises:
        DataError: The package or the file is missing.
    """
    package, _, file = name.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin if spec and spec.origin else package).parent / FOLDERS[package] / file
    if not path.exists():
        raise DataError(f"{path} is missing; install it with: pip install 'mixture-of-activations[vision]'")
    return path


def open_photograph(path: Path) -> Image.Image:
    """Return a photograph as an RGB image."""
    return to_mode(Image.open(path, formats=FORMATS))


def crops(path: Path, count: int) -> list[Image.Image]:
    """Return `count` square RGB crops of one photograph, resized to `VAL_PIXELS`.

    Sides are log-uniform between `VAL_SMALLEST_SIDE` and the short side, measured in the photograph resized to
    `SHORT_SIDE`. The crops are a function of the file's name.
    """
    image = open_photograph(path)
    scale = max(1.0, min(image.size) / SHORT_SIDE)
    generator = np.random.default_rng(list(path.name.encode()))
    low, high = np.log(scale * VAL_SMALLEST_SIDE), np.log(min(image.size))
    result = []
    for side in np.exp(generator.uniform(low, high, count)).astype(int):
        left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
        box = (left, top, left + int(side), top + int(side))
        result.append(image.resize((VAL_PIXELS, VAL_PIXELS), Image.Resampling.BICUBIC, box, reducing_gap=3.0))
    return result


def make_photograph_shards(out: Path, workers: int = 1) -> list[Report]:
    """Write `out`/train and `out`/val, labelled by photograph; a finished set is kept.

    Raises:
        DataError: A photograph is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder, "train"), Path(folder, "val")
        for file in map(photograph_file, TRAIN):
            target = train / file.stem
            target.mkdir(parents=True)
            image = open_photograph(file)
            scale = min(1.0, SHORT_SIDE / min(image.size))
            size = (round(scale * image.width), round(scale * image.height))
            image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(target / "000.jpg", quality=95)
            for copy in range(1, COPIES):
                (target / f"{copy:03d}.jpg").hardlink_to(target / "000.jpg")
        for file in map(photograph_file, VAL):
            target = val / file.stem
            target.mkdir(parents=True)
            for number, crop in enumerate(crops(file, VAL_CROPS)):
                crop.save(target / f"{number:03d}.jpg", quality=95)
        settings = ShardSettings(samples_per_shard=448, seed=SEED)
        return [make_shards(str(part), out / part.name, settings, workers=workers)[0] for part in (train, val)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moa_vision.photographs", description="Make the data of the demo: shards of photographs."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for train/ and val/")
    out = parser.parse_args(arguments).out
    try:
        train, val = make_photograph_shards(out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {train.samples:,} training and {val.samples:,} held-out samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
