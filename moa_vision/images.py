"""Encoded image -> upright pixels -> crops, all (H, W, C) as the decoders lay them out in memory.

C is 1 (grey) or 3 (RGB) of every image that PIL reads, converted where it has other channels. Other numbers, and
numbers of more than 8 bits, come from arrays: .npy, TIFF, and PIL's images with so many bands, never converted.
Pixels are uint8, or float32 where the array is of uint16 (divided by 65535) or of floats (taken as they are).
"""

import io
import logging
import math
import warnings
from collections.abc import Callable
from typing import cast

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

MAX_PIXELS = 178_956_970
"""Of an image that is decoded; one that claims more, for which PIL would not stop either, is taken for an attack."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM")
"""Of `moa_vision.table.IMAGE_EXTENSIONS`, in PIL's names; others' readers may start programs, as that of EPS does."""

MODES = {1: "L", 3: "RGB"}
"""Number of channels -> PIL's mode to which any image is converted."""

# A larger text or colour profile makes PIL refuse a PNG whose pixels are fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would warn of a sample each time; we raise ImageError

_JPEG_MAGIC = b"\xff\xd8\xff"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CROP_ATTEMPTS = 10  # of torchvision's RandomResizedCrop.get_params
CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2  # uniform numbers that one random_box takes


class ImageError(ValueError):
    """The bytes are no image of the channels asked for; the message says why."""


def _torchvision_jpeg() -> Callable[[Tensor], Tensor]:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode

    def decode_jpeg(data: Tensor) -> Tensor:
        with warnings.catch_warnings():  # it announces its removal at every call
            warnings.filterwarnings("ignore", message=".*capabilities of TorchVision are deprecated")
            return cast(Tensor, decode(data, mode=ImageReadMode.RGB, apply_exif_orientation=True))

    return decode_jpeg


def _jpeg_decoder() -> Callable[[Tensor], Tensor]:
    """torchcodec's decoder, or torchvision's where torchcodec is absent, older than 0.16 or unable to load."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return _torchvision_jpeg()
    return cast(Callable[[Tensor], Tensor], decode_jpeg)


_decode_jpeg = _jpeg_decoder()


def is_upright(image: Image.Image) -> bool:
    """Whether the orientation that EXIF or XMP gives leaves PIL's image as it is; a damaged block gives none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9)
    except Exception:  # of many types, as PIL's readers
        return True


def to_mode(image: Image.Image, channels: int = 3) -> Image.Image:
    """Any PIL image as upright 8-bit grey or RGB.

    The orientation is applied, 16-bit grey is scaled to 8 bits, transparency is laid over white, and palette, CMYK,
    grey and RGB are converted.

    Args:
        image: of any mode.
        channels: one of `MODES`.

    Raises:
        ImageError: for pixels without a known range (floating point, 32-bit integers beyond 16 bits).
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
    """PIL's image of the encoded `data`, fully read, so that a truncated file fails here.

    Raises:
        ImageError: if PIL cannot read it.
    """
    image = open_header(data)
    try:
        image.load()
    except Exception as error:  # PIL's readers raise many types: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{error}" or type(error).__name__) from error
    return image


def open_header(data: bytes) -> Image.Image:
    """PIL's image of the encoded `data`, its pixels not read yet.

    Raises:
        ImageError: if PIL cannot read it, or it claims more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"no image of a format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise ImageError(f"{error}" or type(error).__name__) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"it claims {image.width} x {image.height} pixels; {MAX_PIXELS:,} are allowed")
    return image


def decode_image(data: np.ndarray, channels: int | None = 3) -> Tensor:
    """Decodes an image of one of `FORMATS` or an .npy file, by torchcodec (JPEG), PIL, tifffile or numpy.

    Args:
        data: (n,) uint8, the encoded file.
        channels: C of the result; None: as many as an array has, and 3 of other images.

    Returns:
        (H, W, C) uint8 or float32, contiguous, upright.

    Raises:
        ImageError: if the image is damaged, truncated, larger than `MAX_PIXELS`, of no known kind, or an array of
            another number of channels.
    """
    encoded = data.tobytes()
    if is_array(encoded, channels):
        pixels = read_array(encoded, channels)
        if pixels.dtype == np.uint16:
            pixels = pixels.astype(np.float32) / 65535
        return torch.from_numpy(np.array(pixels, order="C"))
    # The other decoders see an orientation in the first APP1 segment only.
    if encoded.startswith(_JPEG_MAGIC) and channels != 1 and is_upright(open_header(encoded)):
        try:
            return _decode_jpeg(torch.from_numpy(data)).permute(1, 2, 0).contiguous()
        except (RuntimeError, ValueError):
            pass  # PIL reads rare kinds of JPEG that libjpeg's wrapper refuses, and says best what is wrong
    try:
        pixels = np.array(to_mode(open_image(encoded), channels or 3))
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
    except ImageError:
        raise
    except Exception as error:  # a broken palette shows up on conversion
        raise ImageError(f"{error}" or type(error).__name__) from error


def is_array(data: bytes, channels: int | None = 3) -> bool:
    """Return whether `data` must be read by `read_array` to get `channels`; arguments as `decode_image`."""
    if data.startswith(npy.MAGIC_PREFIX) or channels not in (None, *MODES):
        return True
    if not data.startswith(_TIFF_MAGICS):
        return False
    try:
        return open_header(data).mode == "F"
    except ImageError:  # PIL reads neither more than four bands nor floats of several
        return True


def read_array(data: bytes | Image.Image, channels: int | None) -> np.ndarray:
    """Reads an image as numbers that nothing converts.

    Args:
        data: .npy of (H, W, C), (C, H, W) or (H, W); TIFF whose bands or pages are the channels; else PIL's bands.
        channels: C, by which the first two are told apart; None: any.

    Returns:
        (H, W, C) uint8, uint16 or float32 (any float).

    Raises:
        ImageError: as `decode_image`, and for other dtypes and numbers that are not finite.
    """
    try:
        if isinstance(data, Image.Image):
            array = np.asarray(data)
        elif data.startswith(npy.MAGIC_PREFIX):
            array = _read_npy(data, channels)
        elif data.startswith(_TIFF_MAGICS):
            array = _read_tiff(data, channels)
        else:
            image = open_image(data)
            array = np.asarray(image if is_upright(image) else ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # tifffile raises many types, and so does numpy for a header that makes no sense
        raise ImageError(f"{error}" or type(error).__name__) from error
    array = np.asarray(array if array.ndim == 3 else array[..., None], array.dtype.newbyteorder("="))
    _require_shape(array.shape, channels)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ImageError("it has pixels that are not finite; replace them, e.g. by 0")
    elif array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{array.dtype} pixels have no known range; allowed: uint8, uint16 and floats")
    return array


def _require_shape(shape: tuple[int, ...], channels: int | None) -> None:
    height, width, found = shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ImageError(f"it claims {width} x {height} pixels; 1 to {MAX_PIXELS:,} are allowed")
    if channels is not None and found != channels:
        raise ImageError(
            f"it has {found} channel{'s' * (found != 1)}, not {channels}; set model.encoder_args.in_chans, and "
            "--channels of make_shards.py, to the images' number"
        )


def _read_npy(data: bytes, channels: int | None) -> np.ndarray:
    """The array of an .npy file, channels last; nothing is allocated or unpickled for what its header claims."""
    file = io.BytesIO(data)
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if len(shape) not in (2, 3):
        raise ImageError(f"its array has the shape {shape}; allowed: (H, W), (H, W, C) and (C, H, W)")
    pixels = np.frombuffer(data, dtype, math.prod(shape), file.tell()).reshape(shape, order="F" if fortran else "C")
    first = len(shape) == 3 and channels != shape[2] and (channels == shape[0] or shape[0] < shape[2])
    return np.moveaxis(pixels, 0, 2) if first else pixels


def _read_tiff(data: bytes, channels: int | None) -> np.ndarray:
    """The first image of a TIFF file, channels last."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if [axis for axis in axes if axis in "YX"] != ["Y", "X"] or len(axes) > 3:
            raise ImageError(f"its axes {axes} of {shape} are not those of an image with channels")
        order = [axes.index("Y"), axes.index("X"), *(i for i, axis in enumerate(axes) if axis not in "YX")]
        _require_shape((*(shape[i] for i in order), 1)[:3], channels)
        array = series.asarray()
    if array.shape != shape:
        raise ImageError(f"it is damaged or cut short: {array.size} of {math.prod(shape)} numbers can be read")
    return array.transpose(order)


def random_box(
    draws: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The box of torchvision's `RandomResizedCrop.get_params`, from numbers drawn beforehand.

    Args:
        draws: (CROP_DRAWS,) uniform in [0, 1).
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: smallest and largest area of the box, as a fraction of the image.
        ratio: smallest and largest width / height, drawn uniformly in its logarithm.
    """
    area, (low, high) = height * width, np.log(ratio)
    for u_area, u_ratio in draws[: 2 * _CROP_ATTEMPTS].reshape(-1, 2).tolist():
        target = area * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = float(np.exp(low + (high - low) * u_ratio))
        w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    h, w = height, width  # the central crop of the nearest allowed ratio
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def central_box(height: int, width: int, size: tuple[int, int], crop_pct: float) -> Box:
    """The centred box with the shape of `size` that covers `crop_pct` of the image's limiting side.

    Resized to `size` this is timm's evaluation (resize the short side to size / crop_pct, then crop the centre) in
    one resampling instead of two.
    """
    scale = crop_pct * min(height / size[0], width / size[1])
    h, w = (min(limit, max(1, round(scale * side))) for side, limit in zip(size, (height, width), strict=True))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_into(out: Tensor, image: Tensor, box: Box, flip: bool = False) -> None:
    """Crops `image` to `box`, resizes it to `out` by antialiased bicubic interpolation, mirrors it if `flip`.

    The batch axis goes in front of (H, W, C) before the axes are permuted: only then do the strides say
    channels-last and does torch resize the pixels where they lie. `[None]` on a (3, H, W) view of the same memory
    costs 60 % more time for the same bits. Torch has fast code for three and four channels, so more go by fours.

    Args:
        out: (h, w, C), written.
        image: (H, W, C), contiguous, of the same dtype.
        box: top, left, height, width.
        flip: mirror left to right.
    """
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    if crop.shape == out.shape:
        out.copy_(crop.flip(1) if flip else crop)
        return
    for into, part in zip(out.split(4, dim=2), crop.split(4, dim=2), strict=True):
        pixels = (part.contiguous() if crop.shape[2] > 4 else part)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(pixels, out.shape[:2], mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        into.copy_(resized.flip(1) if flip else resized)
