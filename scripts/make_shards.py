"""Packs images into tar shards with an index and a manifest, which training reads by offset.

  python scripts/make_shards.py --source photos/ --out data/photos --val-fraction 0.05
  python scripts/make_shards.py --source imagenet/train --out data/imagenet/train --short-side 320 --workers 32
  python scripts/make_shards.py --source 'old/shard-{0000..0031}.tar' --out data/smaller --short-side 256
  python scripts/make_shards.py --source torchvision:CIFAR10:root=DIR:download=true:split=train --out data/cifar10
  python scripts/make_shards.py --source hf:uoft-cs/cifar100:split=test --out data/cifar100-val

Stopped or failed? Run the same command again: finished shards are verified and kept.
"""

import argparse
import os
import sys
from typing import Any

from moa_train.errors import DataError
from moa_vision.shards import ShardSettings, make_shards

_SHOWN = 10  # skipped images that are printed; the manifest has them all


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = ShardSettings()

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add(
        "--source",
        "folder of images (its folders are the classes) | tars by path, {brace}, glob, http(s)://, hf://, pipe: "
        "| torchvision:NAME:root=DIR[:split=train] | hf:NAME[:config=NAME][:split=train]",
        required=True,
    )
    add("--out", "folder of the data set; of train/ and val/ with --val-fraction", required=True)
    add(
        "--short-side",
        "make larger images smaller, to this short side (default: keep sizes)",
        type=int,
        metavar="PIXELS",
    )
    add(
        "--samples-per-shard",
        "images of a shard (default: %(default)s)",
        type=int,
        default=defaults.samples_per_shard,
        metavar="N",
    )
    add(
        "--val-fraction",
        "part of the images that goes to a validation set (default: none)",
        type=float,
        default=0.0,
        metavar="F",
    )
    add(
        "--quality",
        "of JPEGs that must be encoded anew (default: %(default)s); others keep their bytes",
        type=int,
        default=defaults.quality,
    )
    add(
        "--channels",
        "of the images: 3 (RGB) and 1 (grey) make JPEGs of any image; other numbers take .npy, TIFF and PNG of so "
        "many channels and make .npy (default: %(default)s)",
        type=int,
        default=defaults.channels,
        metavar="C",
    )
    add("--seed", "of the order and the split (default: %(default)s)", type=int, default=defaults.seed)
    add("--workers", "processes (default: %(default)s)", type=int, default=os.cpu_count() or 1, metavar="N")
    add(
        "--image-key",
        "the image among the members of a tar's sample, e.g. input.jpg, or input.jpg;jpg in order of preference; "
        "the column of an hf: data set",
        metavar="NAME",
    )
    add("--cache-dir", "for remote or compressed tars (default: ~/.cache/moa_vision)", metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 if it succeeded."""
    given = parse(arguments)
    try:
        settings = ShardSettings(given.short_side, given.quality, given.samples_per_shard, given.seed, given.channels)
        print(f"packing {given.source} into {given.out} with {given.workers} processes", flush=True)
        reports = make_shards(
            given.source,
            given.out,
            settings,
            val_fraction=given.val_fraction,
            workers=given.workers,
            cache_dir=given.cache_dir,
            image_key=given.image_key,
        )
    except (ValueError, OSError, DataError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    for report in reports:
        print(
            f"{report.folder}: {report.samples} images in {report.shards} shards ({report.kept_shards} kept), "
            f"{report.bytes / 2**20:.1f} MiB, {len(report.skipped)} images skipped"
        )
        for entry in report.skipped[:_SHOWN]:
            print(f"  skipped {entry['source']}: {entry['reason']}")
        if len(report.skipped) > _SHOWN:
            print(f"  ... and {len(report.skipped) - _SHOWN} more: see {report.folder / 'manifest.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
