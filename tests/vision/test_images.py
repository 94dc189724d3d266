"""Decoding equals PIL, numpy and tifffile for every kind of image and number of channels."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from moa_vision import images
from moa_vision.encoding import encode_jpeg
from moa_vision.images import ImageError, decode_image
from moa_vision.table import IMAGE_EXTENSIONS

# PIL warns of much that is odd in an image
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning:PIL")


def decode(data, channels=3):
    return decode_image(np.frombuffer(bytearray(data), np.uint8), channels).numpy()


def saved(array, fortran=False):
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array) if fortran else array)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    order = {"=": None, "|": None}.get(array.dtype.byteorder, array.dtype.byteorder)
    tifffile.imwrite(buffer, array, photometric="minisblack", byteorder=order, **options)
    return buffer.getvalue()


# --- colour and grey ----------------------------------------------------------------------------------------------


def test_rgb_and_grey_equal_pil(photos, encode):
    for photo in photos[:2]:
        for data in (encode(photo), encode(photo.convert("L")), encode(photo.convert("CMYK")), encode(photo, "PNG")):
            expected = Image.open(io.BytesIO(data)).convert("RGB")
            assert np.abs(decode(data).astype(int) - expected).max() <= 1
            assert np.array_equal(decode(data, 1)[..., 0], expected.convert("L"))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" %s></x:xmpmeta>'


def xmp_first(jpeg):
    """Move the XMP segment of a JPEG before its EXIF segment, as some cameras write it."""
    exif = jpeg.index(b"\xff\xe1")
    xmp = jpeg.index(b"\xff\xe1", exif + 1)
    rest = xmp + 2 + int.from_bytes(jpeg[xmp + 2 : xmp + 4], "big")
    return jpeg[:exif] + jpeg[xmp:rest] + jpeg[exif:xmp] + jpeg[rest:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(photos, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = [encode(photos[1], name, exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [encode(photos[1].convert("CMYK"), exif=exif), xmp_first(encode(photos[1], exif=exif, xmp=XMP % b""))]
    files.append(encode(photos[1], xmp=XMP % b'tiff:Orientation="%d"' % orientation))
    for data in files:
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode(data), expected)
        assert Image.open(io.BytesIO(encode_jpeg(data, None, 95)[0])).size == expected.size


def test_large_png_metadata_is_accepted(photos, encode):
    """PIL's default limits are one mebibyte, which editors and image generators exceed."""
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    data = encode(photos[0], "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    assert np.array_equal(decode(data), photos[0])


def test_only_listed_formats_are_opened(photos, encode, monkeypatch):
    """PIL would pass an EPS to Ghostscript, which runs it as a program."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: started.append(args))
    for name in ("EPS", "JPEG2000", "ICO", "PCX"):
        with pytest.raises(ImageError, match="not an image of a supported format"):
            decode(encode(photos[0], name))
    assert not started
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "MPO"):  # MPO: several images in a .jpg
        options = {"save_all": True, "append_images": [photos[0]]} if name == "MPO" else {}
        assert decode(encode(photos[0], name, **options)).shape == (photos[0].height, photos[0].width, 3)
    extensions = set(IMAGE_EXTENSIONS) - {"npy"}
    assert {Image.registered_extensions()[f".{extension}"] for extension in extensions} == set(images.FORMATS)


def test_torchvision_fallback_gives_the_same_bits(photos, encode, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 8
    files = encode(photos[0]), encode(photos[1].convert("CMYK")), encode(photos[2], exif=exif)
    expected = [decode(data) for data in files]
    monkeypatch.setattr(images, "_decode_jpeg", images._torchvision_jpeg)
    assert all(np.array_equal(decode(data), pixels) for data, pixels in zip(files, expected, strict=True))


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">u2", np.float64])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_arrays_are_read_without_conversion(channels, dtype):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, channels)).astype(dtype)
    first = np.ascontiguousarray(np.moveaxis(array, 2, 0))
    files = [saved(array), saved(first), saved(array, fortran=True)]
    if channels > 3 or array.dtype.kind == "f":  # PIL converts others to 8 bits
        bands = {"planarconfig": "contig"} if channels > 1 else {}
        files += [tiff(array, **bands), tiff(array, compression="zlib", tile=(16, 16), **bands)]
    if channels > 3:
        files += [tiff(first, planarconfig="separate"), tiff(first)]  # the last: one page per channel
    expected = array.astype(np.float32) / (65535 if array.dtype.kind == "u" and array.itemsize == 2 else 1)
    for data in files:
        pixels = decode(data, channels)
        assert pixels.dtype == (np.uint8 if dtype == np.uint8 else np.float32) and pixels.flags.c_contiguous
        assert np.array_equal(pixels, expected)


def test_bands_of_pil_images_are_channels(photos, encode):
    rgba = photos[0].convert("RGBA")
    rgba.putalpha(photos[0].convert("L"))
    for image, form, channels in ((rgba, "PNG", 4), (rgba.convert("LA"), "PNG", 2), (rgba, "TIFF", 4)):
        data = encode(image, form)
        assert np.array_equal(decode(data, channels), Image.open(io.BytesIO(data)))
    with pytest.raises(ImageError, match="has 3 channels, not 4"):
        decode(encode(photos[0]), 4)


@pytest.mark.parametrize(("data", "channels", "reason"), [
    (saved(np.zeros((19, 18, 12), np.uint8)), 3, "has 12 channels, not 3; .*in_chans.*--channels"),
    (tiff(np.zeros((2, 5, 9, 8), np.uint8), metadata={"axes": "ZCYX"}), 5, "axes ZCYX of .2, 5, 9, 8. are not"),
    (saved(np.zeros((9, 8), np.int32)), 1, "int32 pixels have no known range; allowed are uint8, uint16"),
    (saved(np.full((9, 8), np.nan)), 1, "non-finite"),
    (saved(np.zeros(9, np.uint8)), 1, "has shape .9,."),
    (saved(np.zeros((0, 8), np.uint8)), 1, "has 8 x 0 pixels"),
    (saved(np.zeros((9, 8), np.uint8)).replace(b"(9, 8)", b"(9, 9)"), 1, "buffer is smaller"),
    (saved(np.array([[print]])), 1, "OBJECT"),  # never unpickled
])  # fmt: skip
def test_unsuitable_arrays_are_image_errors(data, channels, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data, channels)


# --- malformed files ----------------------------------------------------------------------------------------------


def photo(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).resize((40, 32)).save(buffer, form, **options)
    return buffer.getvalue()


BANDS = np.arange(32 * 40 * 5).astype(np.uint16).reshape(32, 40, 5)
FILES = {
    "jpeg": photo("JPEG", progressive=True),
    "png": photo("PNG"),
    "webp": photo("WEBP"),
    "gif": photo("GIF"),
    "tiff": photo("TIFF", compression="tiff_lzw"),
    "bands": tiff(BANDS, planarconfig="contig", compression="zlib"),
    "npy": saved(BANDS),
}


@pytest.mark.parametrize("form", FILES)
def test_damaged_images_are_decoded_or_image_errors(fuzz, fuzzing, form):
    channels = 5 if form in ("bands", "npy") else 3

    def attempt(data):
        try:
            pixels = decode_image(np.frombuffer(bytearray(data), np.uint8), channels)
        except ImageError as error:
            assert str(error)
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == channels and pixels.dtype in (torch.uint8, torch.float32)

    fuzz(fuzzing.damaged(FILES[form]), attempt, examples=100)


def test_decompression_bombs_are_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # another library may have removed it
    monkeypatch.setattr(images, "_decode_jpeg", lambda data: pytest.fail("decoded"))
    data = bytearray(photo("JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        decode(data)
