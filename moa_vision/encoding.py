"""Encoding of images for shards: JPEG, or .npy for arrays of other channels and dtypes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from moa_train.errors import require
from moa_vision.crops import crop_into
from moa_vision.images import MODES, is_array, is_upright, open_image, read_array, to_mode

_SMALL = 64  # images with a shorter side in pixels keep full colour resolution


@dataclass(frozen=True)
class ShardSettings:
    """Settings that determine the bytes of shards, together with their source.

    Args:
        short_side: Larger images are reduced to this short side in pixels; None: keep sizes.
        quality: Quality of JPEGs that are re-encoded; JPEGs that keep their size keep their bytes.
        samples_per_shard: Images of a shard, including skipped ones.
        seed: Seed of the order of the images.
        channels: 3 and 1 write JPEGs of any image (1: grey if re-encoded). Other numbers, and images that only
            `moa_vision.images.read_array` reads, are written as .npy of (H, W, C); images with another number of
            channels are skipped.
    """

    short_side: int | None = None
    quality: int = 95
    samples_per_shard: int = 1000
    seed: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("short_side", self.short_side, self.short_side is None or self.short_side >= 1, "1 pixel or more")
        require("quality", self.quality, 1 <= self.quality <= 100, "1 to 100")
        require("samples_per_shard", self.samples_per_shard, self.samples_per_shard >= 1, "1 or above")
        require("channels", self.channels, self.channels >= 1, "1 or above")


def encode_image(image: bytes | Image.Image, settings: ShardSettings) -> tuple[str, bytes, dict[str, Any]]:
    """Encode an image (encoded, or decoded by PIL) as a shard stores it.

    Returns:
        "jpg" or "npy", the file, and {"width", "height", "original_width", "original_height"} in pixels.

    Raises:
        ImageError: The image cannot be read.
    """
    channels = settings.channels
    if channels in MODES and not (isinstance(image, bytes) and is_array(image, channels)):
        return "jpg", *encode_jpeg(image, settings.short_side, settings.quality, channels)
    return "npy", *encode_array(read_array(image, channels), settings.short_side)


def encode_array(array: np.ndarray, short_side: int | None) -> tuple[bytes, dict[str, Any]]:
    """Encode (H, W, C) uint8, uint16 or float32 as .npy of the same dtype; see `encode_jpeg`."""
    height, width = array.shape[:2]
    size = _reduced_size(short_side, (width, height))
    if size != (width, height):
        wide = array.dtype == np.uint16  # torch does not resize it
        pixels = torch.from_numpy(np.array(array, np.float32 if wide else array.dtype, order="C"))
        resized = torch.empty(size[1], size[0], array.shape[2], dtype=pixels.dtype)
        crop_into(resized, pixels, (0, 0, height, width))
        array = resized.round().clamp(0, 65535).numpy().astype(np.uint16) if wide else resized.numpy()
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue(), _sizes(size, (width, height))


def encode_jpeg(
    image: bytes | Image.Image, short_side: int | None, quality: int, channels: int = 3
) -> tuple[bytes, dict[str, Any]]:
    """Encode an image as an upright RGB or grey JPEG, reduced to `short_side` by antialiased bicubic interpolation.

    An upright JPEG that is small enough keeps its bytes. Results and errors as `encode_image`; also ImageError for
    pixels of unknown range.
    """
    decoded = open_image(image) if isinstance(image, bytes) else image
    fits = _reduced_size(short_side, decoded.size) == decoded.size
    plain = decoded.format == "JPEG" and decoded.mode in MODES.values() and is_upright(decoded)
    if isinstance(image, bytes) and plain and fits:
        return image, _sizes(decoded.size, decoded.size)
    decoded = to_mode(decoded, channels)
    original = decoded.size
    if not fits:
        decoded = decoded.resize(_reduced_size(short_side, original), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    chroma = "4:4:4" if min(decoded.size) < _SMALL or channels == 1 else "4:2:0"
    decoded.save(buffer, "JPEG", quality=quality, subsampling=chroma)
    return buffer.getvalue(), _sizes(decoded.size, original)


def _reduced_size(short_side: int | None, size: tuple[int, int]) -> tuple[int, int]:
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def _sizes(size: tuple[int, int], original: tuple[int, int]) -> dict[str, Any]:
    return dict(zip(("width", "height", "original_width", "original_height"), size + original, strict=True))
