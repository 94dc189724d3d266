"""Batches: order, pixels and masks are functions of (seed, epoch, position), and bad samples are named."""

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm.data
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from timm.data.loader import adapt_to_chs
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from moa_train.data_order import StepBatches
from moa_vision import images
from moa_vision.data import (
    DataConfig,
    ImageBatch,
    ValSamples,
    normalize,
    train_loader,
    val_loader,
)
from moa_vision.epoch_order import EpochOrder
from moa_vision.images import CROP_DRAWS, ImageError, central_box, crop_into, decode_image, random_box
from moa_vision.index import open_index
from moa_vision.shards import encode_jpeg
from moa_vision.table import IMAGE_EXTENSIONS, BadSample

SIZE = {"image_size": (48, 32), "num_patches": 6}


def config(**fields):
    return DataConfig(**{"train": "", "workers": 0, "shuffle_window_shards": 2, **fields})


def train(index, **arguments):
    """The batches of 8 steps of 6 images, or as `arguments` say."""
    fields = arguments.pop("config", {})
    settings = {"seed": 3, "global_batch": 6, "micro_batch": 6, "num_steps": 8, **SIZE, **arguments}
    return list(train_loader(index, config(**fields), **settings))


def same(a: list[ImageBatch], b: list[ImageBatch]):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images, y.images) and torch.equal(x.noise, y.noise) and torch.equal(x.labels, y.labels)
        assert x.keys == y.keys and x.bad == y.bad


def joined(batches):
    """Images, noise and keys of all batches, end to end."""
    return (
        torch.cat([b.images for b in batches]),
        torch.cat([b.noise for b in batches]),
        [key for b in batches for key in b.keys],
    )


# --- order --------------------------------------------------------------------------------------------------------

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(shard_sizes, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_order_shows_every_image_and_stays_in_its_window(sizes, seed, window, repeats, shared):
    starts = np.cumsum([0, *sizes])
    order = EpochOrder(starts, seed, window, repeats)
    total = sum(sizes)
    assert (order.slots, len(order)) == (total // repeats, total // repeats * repeats)
    if not order.slots:
        return
    shown = [order.sample(shared * repeats + e, slot) for e in range(repeats) for slot in range(order.slots)]
    assert len(set(shown)) == len(shown) == order.slots * repeats  # each image in one of the R epochs, R crops each
    if repeats == 1:
        assert sorted(shown) == list(range(total))
    shards = [int(np.searchsorted(starts, sample, side="right")) - 1 for sample in shown]
    first_seen = list(dict.fromkeys(shards))
    for shard in first_seen:  # between a shard's first and last sample only the shards of its window are read
        span = shards[shards.index(shard) : len(shards) - shards[::-1].index(shard)]
        assert len(set(span)) <= window
    again = EpochOrder(starts, seed, window, repeats)
    assert [again.sample(shared * repeats, slot) for slot in range(order.slots)] == shown[: order.slots]
    assert order.sample(shared * repeats, order.slots) == shown[0]  # what replaces a bad last sample


def test_orders_of_seeds_and_epochs_differ():
    starts = np.arange(0, 1001, 100)
    orders = [
        tuple(EpochOrder(starts, seed, 4).sample(epoch, slot) for slot in range(1000))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    with pytest.raises(ValueError, match="seed is -1"):
        EpochOrder(starts, -1, 4)


def test_order_of_imagenet_is_light():
    order = EpochOrder(np.arange(0, 1_281_167 + 1252, 1252).clip(max=1_281_167), 0, 8)
    assert sorted(order.sample(0, slot) for slot in range(0, 1_281_167, 50_000))[0] >= 0
    assert order._cached[1].nbytes <= 8 * 1_281_167


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_steps_split_into_the_stated_positions(data):
    world, accumulation, micro = (data.draw(st.integers(1, 4)) for _ in range(3))
    batch, epoch_length = world * accumulation * micro, data.draw(st.integers(20, 200))
    if epoch_length < batch:
        return
    start = data.draw(st.integers(0, 9))
    steps = range(start, start + data.draw(st.integers(0, 9)))
    ranks = [list(StepBatches(epoch_length, batch, micro, rank, world, steps)) for rank in range(world)]
    assert {len(StepBatches(epoch_length, batch, micro, 0, world, steps))} == {len(batches) for batches in ranks}
    per_epoch = epoch_length // batch
    for number, step in enumerate(steps):
        epoch, i = divmod(step, per_epoch)
        seen = []
        for m in range(accumulation):
            for rank in range(world):
                first = i * batch + m * world * micro + rank * micro
                expected = [(epoch, first + k) for k in range(micro)]
                assert ranks[rank][number * accumulation + m] == expected
                seen += expected
        assert sorted(seen) == [(epoch, i * batch + k) for k in range(batch)]


# --- the same batches however they are made -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # 3 workers on 2 cores
def test_workers_ranks_micro_batches_and_starts_do_not_matter(shards):
    index = open_index(str(shards))
    state = torch.get_rng_state()
    expected = train(index)
    assert len(expected) == 8 and expected[0].images.shape == (6, 3, 48, 32)
    assert expected[0].images.dtype == torch.uint8 and expected[0].noise.dtype == torch.float32
    for workers in (1, 3):
        same(train(index, config={"workers": workers}), expected)
    same(train(index, start_step=3), expected[3:])
    same(train(index, start_step=5, config={"workers": 1}), expected[5:])  # 5 steps an epoch: at a boundary
    assert train(index, start_step=8) == []
    halves = [train(index, micro_batch=3, rank=rank, world_size=2) for rank in (0, 1)]
    both = [half for pair in zip(*halves, strict=True) for half in pair]
    parts = train(index, micro_batch=2)
    quarters = [train(index, micro_batch=1, rank=rank, world_size=2, config={"workers": 1}) for rank in (0, 1)]
    singles = [single for pair in zip(*quarters, strict=True) for single in pair]
    for batches in (both, parts, singles):
        for one, other in zip(joined(batches), joined(expected), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(torch.get_rng_state(), state)  # the run's own generator is left alone


def test_epochs_are_exact_and_differ(shards):
    index = open_index(str(shards))
    batches = train(index, global_batch=32, micro_batch=8, num_steps=2)
    epochs = [joined(batches[:4]), joined(batches[4:])]
    every = {index.name(i) for i in range(32)}
    for _, _, keys in epochs:
        assert set(keys) == every
    assert epochs[0][2] != epochs[1][2]
    first, second = (dict(zip(keys, pixels, strict=True)) for pixels, _, keys in epochs)
    assert sum(torch.equal(first[key], second[key]) for key in every) == 0  # new crops
    labels = torch.cat([batch.labels for batch in batches[:4]]).tolist()
    rows = {index.name(i): int(index.table.labels[i]) for i in range(32)}
    assert labels == [rows[key] for key in epochs[0][2]]
    noise = torch.cat([batch.noise for batch in batches])
    assert len(noise.unique(dim=0)) == 64 and noise.min() >= 0 and noise.max() < 1
    assert not torch.equal(train(index)[0].noise, train(index, seed=4)[0].noise)


def test_repeats_share_a_decoded_image(shards, monkeypatch):
    index = open_index(str(shards))
    calls = []
    monkeypatch.setattr("moa_vision.data.decode_image", lambda *args: calls.append(1) or decode_image(*args))
    batches = train(index, global_batch=8, micro_batch=8, num_steps=16, config={"repeated_augmentation": 4})
    assert len(calls) == 32  # 16 steps of 8 crops
    pixels, noise, keys = joined(batches)
    assert set(Counter(keys).values()) == {4}  # 4 epochs: every image, 4 crops of each
    assert all(len(set(keys[i : i + 4])) == 1 for i in range(0, 128, 4))
    assert len(pixels.flatten(1).unique(dim=0)) > 120 and len(noise.unique(dim=0)) == 128
    same(
        train(index, global_batch=8, micro_batch=8, num_steps=16, start_step=7, config={"repeated_augmentation": 4}),
        batches[7:],
    )
    split = train(index, global_batch=8, micro_batch=2, num_steps=16, config={"repeated_augmentation": 4})
    assert torch.equal(joined(split)[0], pixels)


@pytest.mark.slow
def test_data_sets_travel_to_other_processes(shards):
    """By forkserver, Python 3.14's default, which pickles what fork would inherit."""
    index = open_index(str(shards))
    loader = train_loader(index, config(workers=1), seed=3, global_batch=6, micro_batch=6, num_steps=2, **SIZE)
    loader.multiprocessing_context = "forkserver"
    same(list(loader), train(index, num_steps=2))


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(photos):
    return [torch.from_numpy(np.array(photo)) for photo in photos]


def test_crops_equal_torchvisions(decoded):
    generator = np.random.default_rng(0)
    for number in range(40):
        image = decoded[number % 4]
        box = random_box(generator.random(CROP_DRAWS), *image.shape[:2], (0.2, 1.0), (3 / 4, 4 / 3))
        theirs = tv.resized_crop(image.permute(2, 0, 1), *box, [48, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        ours = torch.empty(48, 32, 3, dtype=torch.uint8)
        crop_into(ours, image, box)
        assert (ours.permute(2, 0, 1).int() - theirs.int()).abs().max() <= 1
        top, left, height, width = box
        picture = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
        picture = picture.resize((32, 48), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(picture).astype(int) - ours.numpy()).max() <= 1
        mirrored = torch.empty(48, 32, 3, dtype=torch.uint8)
        crop_into(mirrored, image, box, flip=True)
        assert torch.equal(mirrored, tv.hflip(ours.permute(2, 0, 1)).permute(1, 2, 0))


def test_boxes_are_drawn_as_torchvision_draws_them():
    generator = np.random.default_rng(0)
    for height, width, scale, ratio in ((256, 341, (0.2, 1.0), (3 / 4, 4 / 3)), (40, 300, (0.5, 1.0), (0.9, 1.1))):
        ours = np.array([random_box(generator.random(CROP_DRAWS), height, width, scale, ratio) for _ in range(4000)])
        torch.manual_seed(0)
        blank = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(4000)])
        for column in range(4):
            a, b = ours[:, column], theirs[:, column]
            assert abs(a.mean() - b.mean()) <= 4.5 * np.hypot(a.std(), b.std()) / 4000**0.5
            assert abs(a.std() - b.std()) <= 0.06 * max(a.std(), b.std(), 1)
        assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width
        assert ours.min() >= 0 and ours[:, 2:].min() >= 1


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_boxes_lie_in_the_image(height, width, seed):
    draws = np.random.default_rng(seed).random(CROP_DRAWS)
    boxes = [
        random_box(draws, height, width, (0.2, 1.0), (3 / 4, 4 / 3)),
        central_box(height, width, (48, 32), 0.875),
    ]
    for top, left, h, w in boxes:
        assert h >= 1 and w >= 1 and top >= 0 and left >= 0 and top + h <= height and left + w <= width


def test_training_pixels_are_those_of_the_official_recipe(shards):
    """One batch made again from PIL's pixels, torchvision's resize and numpy's documented generators."""
    index = open_index(str(shards))
    batch = train(index, num_steps=6)[5]  # the first step of epoch 1
    key = np.random.SeedSequence((3, 1)).generate_state(2, np.uint64)
    flips = 0
    for row in range(6):
        stream = np.random.Generator(np.random.Philox(key=key, counter=(0, row, 1, 0)))
        draws = stream.random(23)
        number = [index.name(i) for i in range(32)].index(batch.keys[row])
        data = (Path(index.shards[index.shard_of(number)].url)).read_bytes()
        start = int(index.table.offsets[number])
        picture = Image.open(io.BytesIO(data[start : start + int(index.table.sizes[number])])).convert("RGB")
        box = random_box(draws[1:], picture.height, picture.width, (0.2, 1.0), (3 / 4, 4 / 3))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        crop = tv.resized_crop(pixels, *box, [48, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        crop = tv.hflip(crop) if draws[0] < 0.5 else crop
        flips += draws[0] < 0.5
        assert (crop.int() - batch.images[row].int()).abs().max() <= 1
        assert np.array_equal(batch.noise[row].numpy(), stream.random(6, dtype=np.float32))
    assert 0 < flips < 6


def test_hflip_is_an_option(shards):
    index = open_index(str(shards))
    flipped, straight = train(index), train(index, config={"hflip": False})
    count = 0
    for a, b in zip(joined(flipped)[0], joined(straight)[0], strict=True):
        assert torch.equal(a, b) or torch.equal(a, tv.hflip(b))
        count += not torch.equal(a, b)
    assert 12 < count < 36  # of 48


def test_small_images_are_enlarged(tmp_path, write_tar, encode, photos):
    tiny = photos[0].resize((32, 32))
    write_tar(tmp_path / "cifar.tar", [("a.jpg", encode(tiny)), ("b.png", encode(photos[1].resize((1, 1)), "PNG"))])
    index = open_index(str(tmp_path / "cifar.tar"))
    sizes = {"image_size": (224, 224), "num_patches": 196}
    (batch,) = train(index, global_batch=2, micro_batch=2, num_steps=1, **sizes)
    assert batch.images.shape == (2, 3, 224, 224) and not batch.bad
    (batch,) = val_loader(index, config(val_crop_pct=1.0), batch_size=2, **sizes)
    theirs = tv.resize(decode_image(np.frombuffer(encode(tiny), np.uint8).copy()).permute(2, 0, 1), [224, 224],
                       tv.InterpolationMode.BICUBIC, antialias=True)  # fmt: skip
    assert (batch.images[0].int() - theirs.int()).abs().max() <= 1


def test_images_are_decoded_as_pil_does(photos, encode):
    for photo in photos:
        for data in (encode(photo), encode(photo.convert("L")), encode(photo.convert("CMYK")), encode(photo, "PNG")):
            array = np.frombuffer(data, np.uint8).copy()
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
            assert np.abs(decode_image(array).numpy() - expected).max() <= 1


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" %s></x:xmpmeta>'


def xmp_first(jpeg):
    """A JPEG whose XMP segment precedes the EXIF segment, as some cameras write it."""
    exif = jpeg.index(b"\xff\xe1")
    xmp = jpeg.index(b"\xff\xe1", exif + 1)
    rest = xmp + 2 + int.from_bytes(jpeg[xmp + 2 : xmp + 4], "big")
    return jpeg[:exif] + jpeg[xmp:rest] + jpeg[exif:xmp] + jpeg[rest:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_as_pil_reads_it(photos, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    cmyk = photos[1].convert("CMYK")
    files = [encode(photos[1], name, exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [encode(cmyk, exif=exif), xmp_first(encode(photos[1], exif=exif, xmp=XMP % b""))]
    files.append(encode(photos[1], xmp=XMP % b'tiff:Orientation="%d"' % orientation))
    for data in files:
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
        decoded = decode_image(np.frombuffer(data, np.uint8).copy())
        assert decoded.is_contiguous() and np.array_equal(decoded.numpy(), expected)
        assert Image.open(io.BytesIO(encode_jpeg(data, None, 95)[0])).size == expected.size


def test_what_a_png_says_of_itself_is_no_limit(photos, encode):
    """PIL stops at a text or a colour profile of a mebibyte, which editors and image generators exceed."""
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    data = encode(photos[0], "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    assert np.array_equal(decode_image(np.frombuffer(data, np.uint8).copy()).numpy(), photos[0])
    assert Image.open(io.BytesIO(encode_jpeg(data, None, 95)[0])).size == photos[0].size


# --- numbers of channels ------------------------------------------------------------------------------------------


def saved(array, fortran=False):
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array) if fortran else array)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    order = {"=": None, "|": None}.get(array.dtype.byteorder, array.dtype.byteorder)
    tifffile.imwrite(buffer, array, photometric="minisblack", byteorder=order, **options)
    return buffer.getvalue()


def decode(data, channels):
    return decode_image(np.frombuffer(data, np.uint8).copy(), channels).numpy()


def test_grey_is_pils(photos, encode):
    for data in (encode(photos[0]), encode(photos[0].convert("L")), encode(photos[0].convert("CMYK")),
                 encode(photos[0], "PNG"), encode(photos[0].convert("L"), "TIFF")):  # fmt: skip
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))
        assert np.array_equal(decode(data, 1)[..., 0], expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">u2", np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_arrays_are_read_as_they_are(channels, dtype):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, channels)).astype(dtype)
    first = np.ascontiguousarray(np.moveaxis(array, 2, 0))
    files = [saved(array), saved(first), saved(array, fortran=True)]
    if channels > 3 or array.dtype.kind == "f":  # others PIL turns into 8 bits
        bands = {"planarconfig": "contig"} if channels > 1 else {}
        files += [tiff(array, **bands), tiff(array, compression="zlib", tile=(16, 16), **bands)]
    if channels > 3:
        files += [tiff(first, planarconfig="separate"), tiff(first)]  # at last a page a channel
    expected = array.astype(np.float32) / (65535 if array.dtype.kind == "u" and array.itemsize == 2 else 1)
    for data in files:
        pixels = decode(data, channels)
        assert pixels.dtype == (np.uint8 if dtype == np.uint8 else np.float32) and pixels.flags.c_contiguous
        assert np.array_equal(pixels, expected)
    if channels == 1:
        assert np.array_equal(decode(saved(array[..., 0]), 1), expected)


def test_bands_of_pils_images(photos, encode):
    rgba = photos[0].convert("RGBA")
    rgba.putalpha(photos[0].convert("L"))
    for image, form, channels in ((rgba, "PNG", 4), (rgba.convert("LA"), "PNG", 2), (rgba, "TIFF", 4)):
        data = encode(image, form)
        assert np.array_equal(decode(data, channels), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(("data", "channels", "reason"), [
    (saved(np.zeros((19, 18, 12), np.uint8)), 3, "has 12 channels, not 3; .*in_chans.*--channels"),
    (saved(np.zeros((12, 9, 20), np.uint8)), 3, "has 12 channels, not 3"),
    (tiff(np.zeros((9, 8, 12), np.uint8), planarconfig="contig"), 3, "has 12 channels, not 3"),
    (tiff(np.zeros((9, 8, 12), np.uint8), planarconfig="contig"), 5, "has 12 channels, not 5"),
    (tiff(np.zeros((9, 8), np.float32)), 3, "has 1 channel, not 3"),
    (tiff(np.zeros((2, 5, 9, 8), np.uint8), metadata={"axes": "ZCYX"}), 5, "axes ZCYX of .2, 5, 9, 8. are not"),
    (tiff(np.zeros((2, 5, 9, 8), np.uint8)), 5, "axes QQYX"),
    (saved(np.zeros((9, 8), np.int32)), 1, "int32 pixels have no known range; allowed: uint8, uint16"),
    (saved(np.full((9, 8), np.nan)), 1, "not finite"),
    (saved(np.zeros(9, np.uint8)), 1, "has the shape .9,."),
    (saved(np.zeros((0, 8), np.uint8)), 1, "claims 8 x 0 pixels"),
    (saved(np.zeros((9, 8), np.uint8)).replace(b"(9, 8)", b"(9, 9)"), 1, "buffer is smaller"),
    (saved(np.array([[print]])), 1, "OBJECT"),  # is not unpickled
])  # fmt: skip
def test_arrays_that_do_not_fit_are_named(data, channels, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data, channels)


def test_colours_are_no_bands(photos, encode):
    with pytest.raises(ImageError, match="has 3 channels, not 4"):
        decode(encode(photos[0]), 4)


@pytest.mark.parametrize("wide", [np.uint8, np.uint16])
def test_batches_of_many_channels(wide, tmp_path, write_tar):
    """The same crops as of each channel by itself; a sample of another number is named."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (60, 70, 6)).astype(wide if i == 4 else np.uint8) for i in range(8)]
    members = [(f"k{i}.npy", saved(array)) for i, array in enumerate(arrays)]
    index = open_index(str(write_tar(tmp_path / "a.tar", [*members, ("odd.npy", saved(arrays[0][..., :5]))])))
    arguments = {"channels": 6, "global_batch": 8, "micro_batch": 8, "num_steps": 1}
    (batch,) = train(index, **arguments)
    same(train(index, **arguments, config={"workers": 1}), [batch])
    held_out = list(val_loader(index, config(), batch_size=9, **SIZE, channels=6))
    for bad in (batch.bad, held_out[0].bad):
        assert [(sample.key, "has 5 channels, not 6" in sample.reason) for sample in bad] in ([], [("odd", True)])
    assert held_out[0].bad and len(held_out[0].keys) == 8
    images = held_out[0].images
    assert images.dtype == (torch.uint8 if wide == np.uint8 else torch.float32) and images.shape == (8, 6, 48, 32)
    top, left, h, w = central_box(60, 70, (48, 32), 0.875)
    for key, image in zip(held_out[0].keys, images, strict=True):
        array = arrays[int(key[-1])]
        pixels = torch.from_numpy(array / np.float32(65535) if array.dtype == np.uint16 else array).permute(2, 0, 1)
        theirs = tv.resized_crop(pixels, top, left, h, w, [48, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        unit = 255 if wide == np.uint8 else 1
        theirs = theirs / 255 if pixels.dtype == torch.uint8 else theirs
        assert (image / unit - theirs).abs().max() <= (1.01 / 255 if pixels.dtype == torch.uint8 else 1e-6)


def test_normalization_of_other_numbers_of_channels_is_timms():
    default = config().for_channels(5)
    for ours, theirs in ((default.mean, config().mean), (default.std, config().std)):
        assert ours == pytest.approx(adapt_to_chs(theirs, 5))
    assert config().for_channels(3) == config()
    assert config(mean=(0.5,), std=(0.1, 0.2)).for_channels(2).mean == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"data.std has 2 values, but the model 5 channels .*in_chans.*; give 5"):
        config(std=(0.1, 0.2)).for_channels(5)
    pixels = torch.arange(256).view(1, 1, 16, 16)
    wide, narrow = (normalize(p, (0.4,), (0.2,)) for p in (pixels / 255, pixels.byte()))
    assert torch.allclose(wide, narrow, atol=1e-6)


def test_only_formats_of_images_are_opened(photos, encode, monkeypatch):
    """PIL would hand an EPS to Ghostscript, which runs the program that it is, for as long as that likes."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: started.append(args))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: started.append(args))
    for name in ("EPS", "JPEG2000", "ICO", "PCX"):
        with pytest.raises(ImageError, match="no image of a format that is read"):
            decode_image(np.frombuffer(bytearray(encode(photos[0], name)), np.uint8))
    assert not started
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "MPO"):  # MPO: a .jpg of several images
        options = {"save_all": True, "append_images": [photos[0]]} if name == "MPO" else {}
        data = np.frombuffer(bytearray(encode(photos[0], name, **options)), np.uint8)
        shape = photos[0].height, photos[0].width, 3
        assert decode_image(data).shape == shape and images.open_image(data.tobytes()).format == name
    extensions = set(IMAGE_EXTENSIONS) - {"npy"}
    assert {Image.registered_extensions()[f".{extension}"] for extension in extensions} == set(images.FORMATS)


def test_fallback_decoder_gives_the_same_bits_and_no_warning(photos, encode, monkeypatch):
    fallback = images._torchvision_jpeg()
    exif = Image.Exif()
    exif[0x0112] = 8
    for data in (encode(photos[0]), encode(photos[1].convert("CMYK")), encode(photos[2], exif=exif)):
        array = np.frombuffer(data, np.uint8).copy()
        expected = decode_image(array)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_decode_jpeg", fallback)
            assert torch.equal(decode_image(array), expected)
    with monkeypatch.context() as patch:  # as where torchcodec is not installed
        patch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
        assert images._jpeg_decoder().__module__ == "moa_vision.images"


@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_image_or_a_clear_error(data, magic):
    with pytest.raises(ImageError):
        decode_image(np.frombuffer(bytearray(magic + data), np.uint8))


def test_normalize_equals_torchvisions(shards):
    batch = train(open_index(str(shards)))[0]
    mean, std = config().mean, config().std
    theirs = torchvision.transforms.Normalize(mean, std)(batch.images / 255)
    ours = normalize(batch.images, mean, std)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert ours.dtype == torch.float32 and ours.stride() == batch.images.stride()


# --- validation ---------------------------------------------------------------------------------------------------


def validate(index, fields=None, **arguments):
    return list(val_loader(index, config(**(fields or {})), **{"batch_size": 5, **SIZE, **arguments}))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 7, 1000])
def test_validation_shows_every_sample_once(shards, world_size, limit):
    index = open_index(str(shards))
    ranks = [validate(index, rank=rank, world_size=world_size, limit=limit) for rank in range(world_size)]
    keys = [key for batches in ranks for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == (7 if limit == 7 else 32)
    assert all(len(batch.keys) == 5 for batches in ranks for batch in batches[:-1])
    if limit == 7:
        assert len({key[0] for key in keys}) >= 4  # spread over the shards, not the first seven


def test_validation_masks_belong_to_the_image(shards, tmp_path):
    index = open_index(str(shards))
    expected = validate(index)
    same(validate(index, {"workers": 2}), expected)
    loader = val_loader(index, config(workers=1), batch_size=5, **SIZE)
    same(list(loader), expected)
    same(list(loader), expected)  # again and again
    _, noise, keys = joined(expected)
    reverse = open_index("::".join(str(path) for path in sorted(shards.glob("*.tar"), reverse=True)))
    pixels, other, moved = joined(validate(reverse, batch_size=7))
    assert moved != keys
    by_key = dict(zip(moved, zip(other, pixels, strict=True), strict=True))
    for key, mask, image in zip(keys, noise, joined(expected)[0], strict=True):
        assert torch.equal(by_key[key][0], mask) and torch.equal(by_key[key][1], image)
    seed = np.frombuffer(hashlib.sha256(b"a/a0").digest()[:16], np.uint64)
    drawn = np.random.Generator(np.random.Philox(key=seed)).random(6, dtype=np.float32)
    assert np.array_equal(noise[keys.index("a/a0")].numpy(), drawn)


def test_one_key_in_many_shards_is_many_samples(tmp_path, write_tar, encode, photos):
    """Also where the shards' files have one name; wherever the set lies, masks and names stay the same."""
    shards = {f"{part}/{i}": encode(photos[0].rotate(i)) for i in range(3) for part in ("a", "b")}
    for place in ("here", "there"):
        for name, image in shards.items():
            write_tar(tmp_path / place / f"{name}.tar", [("image.jpg", image)])
    here, there = (f"{tmp_path}/{place}/a::{tmp_path}/{place}/b" for place in ("here", "there"))
    _, noise, names = joined(validate(open_index(here)))
    assert names == [f"{part}/{i}/image" for part in ("a", "b") for i in range(3)]
    assert len(noise.unique(dim=0)) == len(names)
    same(validate(open_index(there)), validate(open_index(here)))
    assert open_index(there).identity() == open_index(here).identity()
    assert joined(validate(open_index(f"{tmp_path}/here/b")))[2] == [f"{i}/image" for i in range(3)]


def test_validation_pixels_are_timms(tmp_path, write_tar, encode, photos):
    """Short side 256: timm's resize is the identity, and so its crop is ours to the bit. Else they differ little."""
    exact, other = photos[1].resize((400, 256), Image.Resampling.BICUBIC), photos[2]
    write_tar(tmp_path / "v.tar", [("a.jpg", encode(exact)), ("b.jpg", encode(other))])
    index = open_index(str(tmp_path / "v.tar"))
    (batch,) = val_loader(index, config(), image_size=(224, 224), num_patches=196, batch_size=2)
    transform = timm.data.create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, normalize=False)
    theirs = [transform(Image.open(io.BytesIO(encode(image)))) for image in (exact, other)]
    assert torch.equal(batch.images[0], theirs[0])
    assert (batch.images[1].float() - theirs[1].float()).abs().mean() < 3


# --- bad samples --------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path, write_tar, encode, photos):
    """12 photographs, of which k2 is truncated, k5 no image, k6 empty; and the same without damage."""
    members = [[f"k{i}.jpg", encode(photos[i % 4].rotate(i))] for i in range(12)]
    write_tar(tmp_path / "whole" / "t.tar", members)
    members[2][1], members[5][1], members[6][1] = members[2][1][:-500], b"nothing", b""
    write_tar(tmp_path / "spoiled" / "t.tar", members)
    return open_index(str(tmp_path / "spoiled")), open_index(str(tmp_path / "whole"))


def test_bad_samples_are_named_and_replaced(spoiled):
    index, whole = spoiled
    expected = train(whole, global_batch=12, micro_batch=4, num_steps=3)
    got = train(index, global_batch=12, micro_batch=4, num_steps=3)
    same(train(index, global_batch=12, micro_batch=4, num_steps=3, config={"workers": 2}), got)
    keys, good_keys = joined(got)[2], joined(expected)[2]
    for epoch in range(3):
        order = good_keys[12 * epoch : 12 * epoch + 12]
        for position in range(12):
            following = [k for k in order[position:] + order[:position] if k not in ("t/k2", "t/k5", "t/k6")]
            assert keys[12 * epoch + position] == following[0]
    for row, (key, good) in enumerate(zip(keys, good_keys, strict=True)):
        assert torch.equal(joined(got)[1][row], joined(expected)[1][row])
        assert key != good or torch.equal(joined(got)[0][row], joined(expected)[0][row])
    bad = {sample for batch in got for sample in batch.bad}
    assert {sample.key for sample in bad} == {"k2", "k5", "k6"}
    assert all(sample.shard.endswith("spoiled/t.tar") for sample in bad)
    assert "truncated" in next(sample.reason for sample in bad if sample.key == "k2")


def test_bad_samples_are_left_out_of_validation(spoiled):
    index, whole = spoiled
    batches = validate(index, batch_size=3)
    assert [len(batch.keys) for batch in batches] == [2, 2, 2, 3]
    assert [sample.key for batch in batches for sample in batch.bad] == ["k2", "k5", "k6"]
    kept = [i for i in range(12) if i not in (2, 5, 6)]
    assert torch.equal(joined(batches)[0], joined(validate(whole))[0][kept])
    (empty,) = [ValSamples(index, config(), **SIZE).__getitems__([5, 6])]
    assert empty.images.shape == (0, 3, 48, 32) and empty.labels.dtype == torch.int64 and len(empty.bad) == 2


def test_too_many_bad_samples_in_a_row_end_the_batch(tmp_path, write_tar):
    write_tar(tmp_path / "none.tar", [(f"{i}.jpg", b"nothing") for i in range(4)])
    (batch,) = train(open_index(str(tmp_path / "none.tar")), global_batch=2, micro_batch=2, num_steps=1)
    assert "4 samples in a row are bad, the last " in batch.failure and len(batch.bad) == 4 and not batch.keys


def test_shard_that_shrinks_or_goes_away_is_named(shards):
    index = open_index(str(shards))
    (shards / "d.tar").write_bytes(b"")
    (shards / "c.tar").unlink()
    batches = validate(index)
    assert {sample.key for batch in batches for sample in batch.bad} == {"d0", *(f"c{i}" for i in range(7))}
    reasons = {sample.reason for batch in batches for sample in batch.bad}
    assert any("ends before" in reason for reason in reasons) and any("No such file" in reason for reason in reasons)
    assert BadSample(str(shards / "d.tar"), "d0", "the shard ends before the sample does") in [
        sample for batch in batches for sample in batch.bad
    ]


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shuffle_window_shards", 0),
        ("repeated_augmentation", 0),
        ("crop_scale", (0.5, 0.2)),
        ("crop_ratio", (0.0, 1.0)),
        ("val_crop_pct", 1.5),
        ("std", (0.0, 1.0, 1.0)),
        ("workers", -1),
        ("max_bad_samples", -1),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"data\.{field} is .*; allowed: "):
        config(**{field: value})


def test_impossible_batches_are_refused(shards):
    index = open_index(str(shards))
    with pytest.raises(ValueError, match=r"global batch of 12.*2 ranks.*micro-batches of 5.*\[6, 3, 2\]"):
        train(index, global_batch=12, micro_batch=5, world_size=2)
    with pytest.raises(ValueError, match="none"):
        train(index, global_batch=5, micro_batch=5, world_size=2)
    with pytest.raises(ValueError, match=r"32 images per epoch.*one global batch of 33"):
        train(index, global_batch=33, micro_batch=33)
    with pytest.raises(ValueError, match="30 images per epoch"):
        train(index, global_batch=32, micro_batch=32, config={"repeated_augmentation": 3})
