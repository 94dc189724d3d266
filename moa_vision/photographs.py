"""The demo's data: photographs that come inside scikit-image's and scikit-learn's wheels, packed as shards.

Training shards hold whole photographs, so that the loader's random crops make every image new. Validation shards hold
fixed crops of other photographs.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from moa_vision.images import FORMATS, to_mode
from moa_vision.shards import Report, ShardSettings, make_shards

FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
"""Package -> folder of its photographs."""

TRAIN = (
    *("skimage/astronaut.png", "skimage/brick.png", "skimage/camera.png", "skimage/cell.png"),
    *(
        "skimage/clock_motion.png",
        "skimage/coffee.png",
        "skimage/grass.png",
        "skimage/gravel.png",
        "skimage/hubble_deep_field.jpg",
    ),
    *("skimage/ihc.png", "skimage/moon.png", "skimage/motorcycle_left.png", "skimage/motorcycle_right.png"),
    *("skimage/retina.jpg", "sklearn/china.jpg"),
)
VAL = ("skimage/chelsea.png", "skimage/coins.png", "skimage/rocket.jpg", "sklearn/flower.jpg")
"""The split is by photograph, so that validation shows scenes never seen; the stereo pair is on one side."""

SHORT_SIDE = 320
"""Largest short side of a training photograph in the shards, in pixels."""

COPIES = 32
"""Samples that hold one training photograph, all alike: an epoch must have at least a batch of samples."""

VAL_CROPS, VAL_PIXELS, VAL_SMALLEST_SIDE = 64, 96, 72
"""Validation crops of each photograph, their size in the shards and their smallest side, both in pixels."""

SEED = 105
"""Order of the samples in the shards."""


def photograph_file(name: str) -> Path:
    """Return the file of one photograph, "package/file" of `TRAIN` or `VAL`.

    Raises:
        FileNotFoundError: the package or the file is absent.
    """
    package, _, file = name.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin if spec and spec.origin else package).parent / FOLDERS[package] / file
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: pip install 'mixture-of-activations[vision]'")
    return path


def crops(path: Path, count: int) -> list[Image.Image]:
    """Return `count` square crops of one photograph as RGB images of `VAL_PIXELS` squared.

    Side lengths are log-uniform between `VAL_SMALLEST_SIDE` and the short side, in the pixels of a photograph whose
    short side is at most `SHORT_SIDE`; the choice is a function of the file's name.
    """
    image = to_mode(Image.open(path, formats=FORMATS))
    scale = max(1.0, min(image.size) / SHORT_SIDE)
    generator = np.random.default_rng(list(path.name.encode()))
    low, high = np.log(scale * VAL_SMALLEST_SIDE), np.log(min(image.size))
    sides = np.exp(generator.uniform(low, high, count)).astype(int)
    result = []
    for side in sides:
        left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
        box = (left, top, left + int(side), top + int(side))
        result.append(image.resize((VAL_PIXELS, VAL_PIXELS), Image.Resampling.BICUBIC, box, reducing_gap=3.0))
    return result


def make_photograph_shards(out: Path, workers: int = 1) -> list[Report]:
    """Write `out`/train and `out`/val, labelled by photograph. A finished set is kept.

    Raises:
        FileNotFoundError: a photograph is absent.
    """
    files = {name: photograph_file(name) for name in (*TRAIN, *VAL)}
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder, "train"), Path(folder, "val")
        for name in TRAIN:
            target = train / files[name].stem
            target.mkdir(parents=True)
            image = to_mode(Image.open(files[name], formats=FORMATS))
            scale = min(1.0, SHORT_SIDE / min(image.size))
            size = (round(scale * image.width), round(scale * image.height))
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            image.save(target / "000.jpg", quality=95)
            for copy in range(1, COPIES):
                (target / f"{copy:03d}.jpg").hardlink_to(target / "000.jpg")
        for name in VAL:
            target = val / files[name].stem
            target.mkdir(parents=True)
            for number, crop in enumerate(crops(files[name], VAL_CROPS)):
                crop.save(target / f"{number:03d}.jpg", quality=95)
        settings = ShardSettings(samples_per_shard=448, seed=SEED)
        return [make_shards(str(part), out / part.name, settings, workers=workers)[0] for part in (train, val)]
