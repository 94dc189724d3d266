"""Encoded image -> upright 8-bit RGB pixels -> crops, all (H, W, 3) uint8 as the decoders lay them out in memory."""

import io
import warnings
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

MAX_PIXELS = 178_956_970
"""Of an image that is decoded; one that claims more, for which PIL would not stop either, is taken for an attack."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM")
"""Of `moa_vision.table.IMAGE_EXTENSIONS`, in PIL's names; others' readers may start programs, as that of EPS does."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_CROP_ATTEMPTS = 10  # of torchvision's RandomResizedCrop.get_params
CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2  # uniform numbers that one random_box takes


class ImageError(ValueError):
    """The bytes are no image that can be turned into 8-bit RGB; the message says why."""


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB.

    EXIF rotation is applied, 16-bit grey is scaled to 8 bits, transparency is laid over white, and palette, CMYK
    and grey are converted.

    Raises:
        ImageError: for pixels without a known range (floating point, 32-bit integers beyond 16 bits).
    """
    image = ImageOps.exif_transpose(image)
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
    return image.convert("RGB")


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


def decode_rgb(data: np.ndarray) -> Tensor:
    """Decodes an image of one of `FORMATS`, by torchcodec (JPEG) or PIL.

    Args:
        data: (n,) uint8, the encoded file.

    Returns:
        (H, W, 3) uint8, contiguous, upright RGB.

    Raises:
        ImageError: if the image is damaged, truncated, larger than `MAX_PIXELS` or of no known kind.
    """
    if data[:3].tobytes() == _JPEG_MAGIC:
        open_header(data.tobytes())
        try:
            return _decode_jpeg(torch.from_numpy(data)).permute(1, 2, 0).contiguous()
        except (RuntimeError, ValueError):
            pass  # PIL reads rare kinds of JPEG that libjpeg's wrapper refuses, and says best what is wrong
    try:
        return torch.from_numpy(np.array(to_rgb(open_image(data.tobytes()))))
    except ImageError:
        raise
    except Exception as error:  # a broken palette or EXIF block shows up on conversion
        raise ImageError(f"{error}" or type(error).__name__) from error


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

    The batch axis goes in front of (H, W, 3) before the axes are permuted: only then do the strides say
    channels-last and does torch resize the pixels where they lie. `[None]` on a (3, H, W) view of the same memory
    costs 60 % more time for the same bits.

    Args:
        out: (h, w, 3) uint8, written.
        image: (H, W, 3) uint8, contiguous.
        box: top, left, height, width.
        flip: mirror left to right.
    """
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    if crop.shape != out.shape:
        pixels = crop[None].permute(0, 3, 1, 2)
        crop = F.interpolate(pixels, out.shape[:2], mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    out.copy_(crop.flip(1) if flip else crop)
