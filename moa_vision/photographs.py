"""The demo's data: many crops of the photographs inside scikit-image's wheel, packed as shards; no download."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from moa_vision.images import FORMATS, to_rgb
from moa_vision.shards import Report, ShardSettings, make_shards

TRAIN = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "clock_motion.png", "coffee.png", "grass.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
)
VAL = ("chelsea.png", "coins.png", "gravel.png", "rocket.jpg")
"""The split is by photograph, so that validation shows scenes never seen; the stereo pair is on one side."""

CROP_PIXELS = 96
SMALLEST_SIDE = 48
SEED = 105
"""Order of the crops in the shards; with this one the reports' eight pictures show every validation photograph."""

TRAIN_CROPS, VAL_CROPS = 240, 64
"""Crops of each photograph."""


def photograph_folder() -> Path:
    """Folder of the photographs in the installed scikit-image.

    Raises:
        FileNotFoundError: scikit-image is absent, or a photograph is.
    """
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else Path("skimage/data")
    missing = [name for name in TRAIN + VAL if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing; install scikit-image>=0.24 from its wheel")
    return folder


def crops(path: Path, count: int) -> list[Image.Image]:
    """`count` square crops of one photograph as (96, 96) RGB images.

    Side lengths are log-uniform between 48 pixels and the short side; the choice is a function of the file's name.
    """
    photograph = to_rgb(Image.open(path, formats=FORMATS))
    generator = np.random.default_rng(list(path.name.encode()))
    sides = np.exp(generator.uniform(np.log(SMALLEST_SIDE), np.log(min(photograph.size)), count)).astype(int)
    result = []
    for side in sides:
        left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
        box = (left, top, left + int(side), top + int(side))
        result.append(photograph.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC, box, reducing_gap=3.0))
    return result


def make_photograph_shards(out: Path, workers: int = 1) -> list[Report]:
    """Write `out`/train and `out`/val: shards of crops, labelled by photograph. A finished set is made again only if
    its folder is gone.
    """
    source, settings = photograph_folder(), ShardSettings(samples_per_shard=520, seed=SEED)
    reports = []
    for split, names, count in (("train", TRAIN, TRAIN_CROPS), ("val", VAL, VAL_CROPS)):
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                target = Path(folder) / Path(name).stem
                target.mkdir()
                for number, crop in enumerate(crops(source / name, count)):
                    crop.save(target / f"{number:03d}.jpg", quality=95)
            reports += make_shards(folder, out / split, settings, workers=workers)
    return reports
