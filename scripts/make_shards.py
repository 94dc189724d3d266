"""Pack images into tar shards with an index and a manifest, which training reads by offset.

  python scripts/make_shards.py --source photos/ --out data/photos --val-fraction 0.05
  python scripts/make_shards.py --source imagenet/train --out data/imagenet/train --short-side 320 --workers 32
  python scripts/make_shards.py --source 'old/shard-{0000..0031}.tar' --out data/smaller --short-side 256
  python scripts/make_shards.py --source torchvision:CIFAR10:root=DIR:download=true:split=train --out data/cifar10
  python scripts/make_shards.py --source hf:uoft-cs/cifar100:split=test --out data/cifar100-val

After an interruption run the same command again: finished shards are verified and kept.
"""

from __future__ import annotations

import argparse
import os
import sys

from moa_train.errors import ConfigError, DataError
from moa_vision.encoding import ShardSettings
from moa_vision.shards import make_shards

_SHOWN = 10
"""Skipped images to print; the manifest lists them all."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = ShardSettings()
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="folder of images (subfolders are classes) | tars by path, {brace}, glob, http(s)://, hf://, pipe: "
        "| torchvision:NAME:root=DIR[:split=train] | hf:NAME[:config=NAME][:split=train]",
    )
    add("--out", required=True, help="output folder; with --val-fraction, of train/ and val/")
    add("--short-side", type=int, metavar="PIXELS", help="reduce larger images to this short side (default: keep)")
    add("--samples-per-shard", type=int, default=defaults.samples_per_shard, metavar="N",
        help="images of a shard (default: %(default)s)")  # fmt: skip
    add("--val-fraction", type=float, default=0.0, metavar="F",
        help="fraction of the images for the validation set (default: none)")  # fmt: skip
    add("--quality", type=int, default=defaults.quality,
        help="quality of JPEGs that are re-encoded; others keep their bytes (default: %(default)s)")  # fmt: skip
    add("--channels", type=int, default=defaults.channels, metavar="C",
        help="3 (RGB) and 1 (grey) write JPEGs of any image; other numbers write .npy of .npy, TIFF and PNG images "
        "with that number of channels (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="seed of the order and the split (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")
    add("--image-key", metavar="NAME",
        help="image member of a tar's samples, e.g. input.jpg, or input.jpg;jpg in order of preference; image column "
        "of an hf: data set")  # fmt: skip
    add("--cache-dir", metavar="DIR", help="cache of remote tars (default: ~/.cache/moa_vision)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(arguments)
    try:
        settings = ShardSettings(args.short_side, args.quality, args.samples_per_shard, args.seed, args.channels)
        print(f"packing {args.source} into {args.out} with {args.workers} processes", flush=True)
        reports = make_shards(
            args.source,
            args.out,
            settings,
            val_fraction=args.val_fraction,
            workers=args.workers,
            cache_dir=args.cache_dir,
            image_key=args.image_key,
        )
    except (ConfigError, DataError, OSError) as error:
        print(f"make_shards: error: {error}", file=sys.stderr)
        return 2
    for report in reports:
        print(
            f"{report.folder}: {report.samples} images in {report.shards} shards ({report.kept_shards} kept), "
            f"{report.bytes / 2**20:.1f} MiB, {len(report.skipped)} images skipped"
        )
        for image in report.skipped[:_SHOWN]:
            print(f"  skipped {image['source']}: {image['reason']}")
        if len(report.skipped) > _SHOWN:
            print(f"  ... and {len(report.skipped) - _SHOWN} more; see {report.folder / 'manifest.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
