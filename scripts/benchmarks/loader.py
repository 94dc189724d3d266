"""Images/s of one core from shards to batches, against the official recipe (PIL, ToTensor, Normalize).

One process with one thread; ours also with four crops an image. Without --shards it takes the demo's photographs.
"""

import argparse
import collections
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moa_vision.data import DataConfig, train_loader
from moa_vision.index import ShardIndex, ShardReader, open_index
from moa_vision.photographs import TRAIN, VAL, photograph_file
from moa_vision.shards import ShardSettings, make_shards

from .measure import Case, measure
from .options import add_out, positive
from .table import rate, report, speed_ratio, times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="pixels of a crop's side (default: %(default)s)")
    add_loading(parser)
    add_out(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Options of what is loaded, for all benchmarks that load."""
    parser.add_argument("--shards", help="shards (default: the demo's photographs, short side 256)")
    parser.add_argument(
        "--batches", type=positive, default=8, help="batches of 64 images a round (default: %(default)s)"
    )


BATCH = 64


class OfficialRecipe(Dataset[Tensor]):
    """Images of facebookresearch/mae: PIL, RandomResizedCrop bicubic, flip, ToTensor, Normalize."""

    def __init__(self, reader: ShardReader, config: DataConfig, size: int) -> None:
        from torchvision import transforms

        self.reader = reader
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=config.crop_scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(config.mean, config.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitem__(self, sample: int) -> Any:
        image = Image.open(io.BytesIO(self.reader.read(sample).tobytes())).convert("RGB")
        return self.transform(image)


def photographs_of_short_side_256(folder: Path) -> str:
    """Shards of the demo's photographs, where no others are given."""
    (folder / "in").mkdir()
    for copy, name in product(range(8), TRAIN + VAL):  # so that they fill a batch
        shutil.copy(photograph_file(name), folder / "in" / f"{copy}-{Path(name).name}")
    make_shards(str(folder / "in"), folder / "out", ShardSettings(short_side=256, quality=90))
    return str(folder / "out")


@contextmanager
def one_core(shards: str | None) -> Iterator[tuple[str, ShardIndex]]:
    """The shards, the given ones or photographs, and their index; torch has one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            shards = shards or photographs_of_short_side_256(Path(folder))
            yield shards, open_index(shards, folder)
    finally:
        torch.set_num_threads(threads)


def load(index: ShardIndex, config: DataConfig, image_size: tuple[int, int], num_patches: int, batches: int) -> None:
    """Our loader in this process, to the end."""
    step = {"global_batch": BATCH, "micro_batch": BATCH, "num_steps": batches}
    loader = train_loader(index, config, image_size=image_size, num_patches=num_patches, seed=0, **step)
    collections.deque(loader, maxlen=0)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    images = args.batches * BATCH
    with one_core(args.shards) as (shards, index):
        official = OfficialRecipe(ShardReader(index), DataConfig(train=shards), args.size)
        generator = torch.Generator().manual_seed(0)
        samples = torch.randint(len(index), (images,), generator=generator).tolist()

        def recipe() -> None:
            collections.deque(DataLoader(official, BATCH, sampler=samples), maxlen=0)

        def ours(repeats: int) -> None:
            config = DataConfig(train=shards, workers=0, repeated_augmentation=repeats)
            load(index, config, (args.size, args.size), 196, args.batches)

        theirs = Case({"loader": "PIL, RandomResizedCrop, ToTensor, Normalize"}, recipe, items=images)
        cases = [
            theirs,
            Case({"loader": "moa_vision"}, partial(ours, 1), items=images, baseline=theirs),
            Case(
                {"loader": "moa_vision, repeated_augmentation=4 (crops)"},
                partial(ours, 4),
                items=images,
                baseline=theirs,
            ),
        ]
        cpu = torch.device("cpu")
        measure(cases, cpu, args.rounds, memory=False)
        remark = f"{BATCH} images a batch, {args.size} pixels, one thread"
        report("loader: one core", cases, [*times(), rate("images"), *speed_ratio()], cpu, args.out, remark)
