"""Decoding of images to upright pixels (H, W, C).

C is 1 (grey) or 3 (RGB) for images that PIL reads; other images are converted to it. Other numbers of channels and more
than 8 bits come from arrays (.npy, TIFF, PIL images with that number of bands) and are never converted. Pixels are
uint8, or float32 for arrays of uint16 (divided by 65535) and of floats (unchanged).
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import torchvision.io
from numpy.lib import format as npy
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode

from moa_train.errors import DataError

MAX_PIXELS = 178_956_970
"""Largest decoded image, PIL's limit for decompression bombs."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM")
"""PIL's names of the formats that are read; readers of others, such as EPS, may start programs."""

MODES = {1: "L", 3: "RGB"}
"""PIL's mode for each number of channels to which images are converted."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# PIL refuses a PNG with a larger text or colour profile, although its pixels are fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it warns of each damaged sample before it raises


class ImageError(DataError):
    """Bytes that are not an image with the requested channels."""


def _torchvision_jpeg(data: Tensor) -> Tensor:
    with warnings.catch_warnings():  # it announces its removal at every call
        warnings.filterwarnings("ignore", message=".*capabilities of TorchVision are deprecated")
        return cast(Tensor, torchvision.io.decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True))


try:
    from torchcodec.decoders import decode_jpeg as _decode_jpeg
except (ImportError, OSError, RuntimeError):  # too old, or FFmpeg cannot be loaded
    _decode_jpeg = _torchvision_jpeg


def is_upright(image: Image.Image) -> bool:
    """Return whether the EXIF or XMP orientation leaves a PIL image unchanged; a damaged block counts as none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9)
    except Exception:  # PIL's readers raise many types
        return True


def to_mode(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert a PIL image of any mode to upright 8-bit grey or RGB (`channels`: a key of `MODES`).

    The orientation is applied, 16-bit grey is scaled to 8 bits, transparency is blended over white, and other modes
    are converted.

    Raises:
        ImageError: The pixels have no known range (floats, 32-bit integers beyond 16 bits).
    """
    image = image if is_upright(image) else ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16", "I;16B", or "I" from readers that widen 16 bits to 32
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("32-bit pixels have no known range; convert the image to 8 or 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def open_image(data: bytes) -> Image.Image:
    """Return the PIL image of encoded `data`, fully read, so that a truncated file raises ImageError here."""
    image = open_header(data)
    with _image_errors():
        image.load()
    return image


def open_header(data: bytes) -> Image.Image:
    """Return the PIL image of encoded `data` without reading its pixels; raise ImageError if PIL cannot."""
    with _image_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn any error of an image library, which raise many types, into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image of a supported format ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


def decode_image(data: np.ndarray, channels: int | None = 3) -> Tensor:
    """Decode an image of one of `FORMATS` or an .npy file, by torchcodec (JPEG), PIL, tifffile or numpy.

    Args:
        data: (n,) uint8, the encoded file.
        channels: C of the result; None: the channels of an array, and 3 for other images.

    Returns:
        (H, W, C) uint8 or float32, contiguous, upright.

    Raises:
        ImageError: The image is damaged, truncated, larger than `MAX_PIXELS`, of an unsupported format, or an array
            with another number of channels.
    """
    encoded = data.tobytes()
    if is_array(encoded, channels):
        pixels = read_array(encoded, channels)
        if pixels.dtype == np.uint16:
            pixels = pixels.astype(np.float32) / 65535
        return torch.from_numpy(np.array(pixels, order="C"))
    # The fast decoder sees only an orientation in the first APP1 segment.
    if encoded.startswith(_JPEG_MAGIC) and channels != 1 and is_upright(open_header(encoded)):
        try:
            return cast(Tensor, _decode_jpeg(torch.from_numpy(data))).permute(1, 2, 0).contiguous()
        except (RuntimeError, ValueError):
            pass  # PIL reads rare kinds of JPEG, and explains damage best
    with _image_errors():  # a broken palette fails on conversion
        pixels = np.array(to_mode(open_image(encoded), channels or 3))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])


def is_array(data: bytes, channels: int | None = 3) -> bool:
    """Return whether only `read_array` can decode `data` to `channels`; arguments as `decode_image`."""
    if data.startswith(npy.MAGIC_PREFIX) or channels not in (None, *MODES):
        return True
    if not data.startswith(_TIFF_MAGICS):
        return False
    try:
        return open_header(data).mode == "F"
    except ImageError:  # PIL reads neither more than four bands nor floats of several
        return True


def read_array(data: bytes | Image.Image, channels: int | None) -> np.ndarray:
    """Read an image as numbers without conversion.

    Args:
        data: .npy of (H, W, C), (C, H, W) or (H, W); TIFF whose bands or pages are the channels; else PIL's bands.
        channels: C, which distinguishes the first two layouts; None: any.

    Returns:
        (H, W, C) uint8, uint16 or float32 (any float).

    Raises:
        ImageError: See `decode_image`; also for other dtypes and non-finite numbers.
    """
    with _image_errors():
        if isinstance(data, Image.Image):
            array = np.asarray(data)
        elif data.startswith(npy.MAGIC_PREFIX):
            array = _read_npy(data, channels)
        elif data.startswith(_TIFF_MAGICS):
            array = _read_tiff(data, channels)
        else:
            image = open_image(data)
            array = np.asarray(image if is_upright(image) else ImageOps.exif_transpose(image))
    array = np.asarray(array if array.ndim == 3 else array[..., None], array.dtype.newbyteorder("="))
    _require_shape(array.shape, channels)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ImageError("it has non-finite pixels; replace them, for example by 0")
    elif array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{array.dtype} pixels have no known range; allowed are uint8, uint16 and floats")
    return array


def _require_shape(shape: tuple[int, ...], channels: int | None) -> None:
    height, width, found = shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ImageError(f"it has {width} x {height} pixels; allowed are 1 to {MAX_PIXELS:,}")
    if channels is not None and found != channels:
        raise ImageError(
            f"it has {found} channel{'s' * (found != 1)}, not {channels}; set model.encoder_args.in_chans, and "
            "--channels of make_shards.py, to the number of channels of the images"
        )


def _read_npy(data: bytes, channels: int | None) -> np.ndarray:
    """Return the array of an .npy file, channels last, without unpickling or trusting the size in its header."""
    file = io.BytesIO(data)
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if len(shape) not in (2, 3):
        raise ImageError(f"its array has shape {shape}; allowed are (H, W), (H, W, C) and (C, H, W)")
    pixels = np.frombuffer(data, dtype, math.prod(shape), file.tell()).reshape(shape, order="F" if fortran else "C")
    channels_first = len(shape) == 3 and channels != shape[2] and (channels == shape[0] or shape[0] < shape[2])
    return np.moveaxis(pixels, 0, 2) if channels_first else pixels


def _read_tiff(data: bytes, channels: int | None) -> np.ndarray:
    """Return the first image of a TIFF file, channels last."""
    import tifffile  # late: training steps need no tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if [axis for axis in axes if axis in "YX"] != ["Y", "X"] or len(axes) > 3:
            raise ImageError(f"its axes {axes} of {shape} are not those of an image with channels")
        order = [axes.index("Y"), axes.index("X"), *(i for i, axis in enumerate(axes) if axis not in "YX")]
        _require_shape((*(shape[i] for i in order), 1)[:3], channels)
        array = series.asarray()
    if array.shape != shape:
        raise ImageError(f"it is damaged or truncated: {array.size} of {math.prod(shape)} numbers can be read")
    return array.transpose(order)
