"""Images/s of one core from shards to batches, against the official recipe (PIL, ToTensor, Normalize).

One process with one thread; ours also with four crops per image. The default shards hold the demo's photographs.
"""

from __future__ import annotations

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

from benchmarks.options import add_number
from benchmarks.tables import rate, report, speed_ratio, times
from benchmarks.timing import Case, measure
from moa_vision.data import BatchSpec, DataConfig, train_loader
from moa_vision.index import ShardIndex, ShardReader, open_index
from moa_vision.photographs import TRAIN, VAL, photograph_file
from moa_vision.shards import ShardSettings, make_shards

BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_number(parser, "--size", 224, "pixels of a crop's side")
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks that load images."""
    parser.add_argument("--shards", help="shards (default: the demo's photographs, short side 256)")
    add_number(parser, "--batches", 8, f"batches of {BATCH} images a round")


class OfficialRecipe(Dataset[Tensor]):
    """Training images of facebookresearch/mae: PIL, bicubic RandomResizedCrop, flip, ToTensor, Normalize."""

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
        """Return the number of samples."""
        return len(self.reader.index)

    def __getitem__(self, sample: int) -> Any:
        """Return a crop (3, H, W)."""
        image = Image.open(io.BytesIO(self.reader.read(sample).tobytes())).convert("RGB")
        return self.transform(image)


def photographs_of_short_side_256(folder: Path) -> str:
    """Pack the demo's photographs; return the folder of the shards."""
    (folder / "in").mkdir()
    for copy, name in product(range(8), TRAIN + VAL):  # so that they fill a batch
        shutil.copy(photograph_file(name), folder / "in" / f"{copy}-{Path(name).name}")
    make_shards(str(folder / "in"), folder / "out", ShardSettings(short_side=256, quality=90))
    return str(folder / "out")


@contextmanager
def one_core(shards: str | None) -> Iterator[tuple[str, ShardIndex]]:
    """Yield the given shards, or photographs, and their index, with torch limited to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            shards = shards or photographs_of_short_side_256(Path(folder))
            yield shards, open_index(shards, folder)
    finally:
        torch.set_num_threads(threads)


def load(index: ShardIndex, config: DataConfig, image_size: tuple[int, int], num_patches: int, batches: int) -> None:
    """Run our loader in this process to its end."""
    step = {"global_batch": BATCH, "micro_batch": BATCH, "num_steps": batches}
    loader = train_loader(index, config, BatchSpec(image_size, num_patches), seed=0, **step)
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
