"""Encoding for shards equals PIL's conversion, resizing and JPEG encoder."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from moa_vision.encoding import ShardSettings, encode_array, encode_jpeg


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def jpeg_of(data, channels=3):
    return encode_jpeg(data, None, 95, channels)[0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_keep_their_bytes(photos, encode, mode):
    data = encode(photos[0].convert(mode))
    assert jpeg_of(data) == jpeg_of(data, channels=1) == data


@pytest.mark.parametrize(("mode", "form"), [
    ("CMYK", "JPEG"), ("P", "GIF"), ("1", "PNG"), ("RGB", "WEBP"),
])  # fmt: skip
def test_other_images_are_reencoded(photos, encode, mode, form):
    data = encode(photos[0].convert(mode), form)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert jpeg_of(data) == encode(image, quality=95)
    assert jpeg_of(encode(image, "PNG"), channels=1) == encode(image.convert("L"), quality=95)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(encode, form):
    grey = np.linspace(0, 65535, 120 * 80).reshape(80, 120)
    decoded = pixels(jpeg_of(encode(Image.fromarray(grey.astype(np.uint16)), form)))
    assert np.abs(decoded - grey[..., None] / 257).mean() < 2.5


def test_transparency_is_blended_over_white(photos, encode):
    alpha = photos[0].convert("RGBA")
    half = photos[0].width // 2
    mask = np.zeros(photos[0].size[::-1], np.uint8)
    mask[:, half:] = 255
    alpha.putalpha(Image.fromarray(mask))
    decoded = pixels(jpeg_of(encode(alpha, "PNG")))
    assert decoded[:, : half - 8].min() > 240
    assert np.abs(decoded - photos[0])[:, half + 8 :].mean() < 6


@pytest.mark.parametrize(("size", "short_side", "expected"), [
    ((200, 301), 100, (100, 150)),
    ((90, 400), 100, (90, 400)),
    ((1000, 3), 2, (667, 2)),
])  # fmt: skip
def test_images_are_reduced_and_never_enlarged(size, short_side, expected, encode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    jpeg, about = encode_jpeg(encode(image, "PNG"), short_side, 95)
    assert tuple(about.values()) == (*expected, *size)
    resized = image.resize(expected, Image.Resampling.BICUBIC)  # antialiased
    assert jpeg == encode(resized, quality=95, subsampling="4:4:4" if min(expected) < 64 else "4:2:0")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_keep_their_dtype_and_values(dtype):
    array = np.arange(19 * 24 * 4).reshape(19, 24, 4).astype(dtype)
    data, _ = encode_array(array, 19)
    assert np.array_equal(np.load(io.BytesIO(data)), array)
    large = np.kron(array, np.ones((2, 2, 1), dtype))
    reduced = np.load(io.BytesIO(encode_array(large, 19)[0]))
    assert reduced.dtype == dtype and reduced.shape == array.shape
    if dtype != np.uint8:  # which wraps around in this picture
        assert np.abs(reduced.astype(float) - array)[4:-4, 4:-4].max() <= 1


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="samples_per_shard is 0; it must be"):
        ShardSettings(samples_per_shard=0)
