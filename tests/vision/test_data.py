"""Batches: order, pixels and masks are functions of (seed, epoch, position); bad samples are replaced and named."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.loader import adapt_to_chs
from torchvision.transforms.v2 import functional as tv

from moa_train.data_order import StepBatches
from moa_train.errors import ConfigError
from moa_vision.crops import central_box, random_box
from moa_vision.data import BatchSpec, DataConfig, EpochOrder, ImageBatch, normalize, train_loader, val_loader
from moa_vision.images import decode_image
from moa_vision.index import open_index

SPEC = BatchSpec((48, 32), 6)


def config(**fields):
    return DataConfig(**{"train": "", "workers": 0, "shuffle_window_shards": 2, **fields})


def train(index, **arguments):
    """Return the batches of 8 steps of 6 images, or as `arguments` say."""
    fields = arguments.pop("config", {})
    settings = {"seed": 3, "global_batch": 6, "micro_batch": 6, "num_steps": 8, **arguments}
    return list(train_loader(index, config(**fields), SPEC, **settings))


def validate(index, spec=SPEC, **arguments):
    return list(val_loader(index, config(), spec, **{"batch_size": 5, **arguments}))


def same(a: list[ImageBatch], b: list[ImageBatch]):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images, y.images) and torch.equal(x.noise, y.noise) and torch.equal(x.labels, y.labels)
        assert x.keys == y.keys and x.bad == y.bad


def joined(batches):
    """Return images, noise and keys of all batches, concatenated."""
    return (
        torch.cat([b.images for b in batches]),
        torch.cat([b.noise for b in batches]),
        [key for b in batches for key in b.keys],
    )


# --- order ----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_steps_split_into_micro_batches_of_ranks(data):
    world, accumulation, micro = (data.draw(st.integers(1, 4)) for _ in range(3))
    batch = world * accumulation * micro
    epoch_length, start = data.draw(st.integers(batch, 200)), data.draw(st.integers(0, 9))
    steps = range(start, start + data.draw(st.integers(0, 9)))
    ranks = [list(StepBatches(epoch_length, batch, micro, rank, world, steps)) for rank in range(world)]
    per_epoch = epoch_length // batch
    for number, step in enumerate(steps):
        epoch, i = divmod(step, per_epoch)
        seen = [p for m in range(accumulation) for rank in ranks for p in rank[number * accumulation + m]]
        assert seen == [(epoch, i * batch + k) for k in range(batch)]


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
    for micro_batch, world_size in ((3, 2), (2, 1), (1, 2)):
        ranks = [train(index, micro_batch=micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        for one, other in zip(joined(batches), joined(expected), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(torch.get_rng_state(), state), "the run's own generator is unchanged"


def test_epochs_are_complete_and_differ(shards):
    index = open_index(str(shards))
    batches = train(index, global_batch=32, micro_batch=8, num_steps=2)
    epochs = [joined(batches[:4]), joined(batches[4:])]
    every = {index.name(i) for i in range(32)}
    assert all(set(keys) == every for _, _, keys in epochs) and epochs[0][2] != epochs[1][2]
    first, second = (dict(zip(keys, pixels, strict=True)) for pixels, _, keys in epochs)
    assert not any(torch.equal(first[key], second[key]) for key in every), "new crops"
    rows = {index.name(i): int(index.table.labels[i]) for i in range(32)}
    assert torch.cat([batch.labels for batch in batches[:4]]).tolist() == [rows[key] for key in epochs[0][2]]
    noise = torch.cat([batch.noise for batch in batches])
    assert len(noise.unique(dim=0)) == 64 and noise.min() >= 0 and noise.max() < 1
    assert not torch.equal(train(index)[0].noise, train(index, seed=4)[0].noise)


def test_repeated_augmentation_shares_decoding(shards, monkeypatch):
    index = open_index(str(shards))
    calls = []
    monkeypatch.setattr("moa_vision.data.decode_image", lambda *args: calls.append(1) or decode_image(*args))

    def repeated(**arguments):
        return train(index, global_batch=8, num_steps=16, config={"repeated_augmentation": 4}, **arguments)

    batches = repeated(micro_batch=8)
    assert len(calls) == 32  # 16 steps of 8 crops
    pixels, noise, keys = joined(batches)
    assert set(Counter(keys).values()) == {4} and all(len(set(keys[i : i + 4])) == 1 for i in range(0, 128, 4))
    assert len(pixels.flatten(1).unique(dim=0)) > 120 and len(noise.unique(dim=0)) == 128
    assert torch.equal(joined(repeated(micro_batch=2, start_step=7))[0], pixels[7 * 8 :])


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_training_pixels_equal_the_official_recipe(shards):
    """One batch rebuilt from PIL's pixels, torchvision's resize and numpy's documented generators."""
    index = open_index(str(shards))
    batch = train(index, num_steps=6)[5]  # first step of epoch 1
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


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("wide", [np.uint8, np.uint16])
def test_batches_of_many_channels(wide, tmp_path, write_tar):
    """Crops equal those of each channel; a sample with another number of channels is bad."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (60, 70, 6)).astype(wide if i == 4 else np.uint8) for i in range(8)]
    members = [(f"k{i}.npy", saved(array)) for i, array in enumerate(arrays)]
    index = open_index(str(write_tar(tmp_path / "a.tar", [*members, ("odd.npy", saved(arrays[0][..., :5]))])))
    (batch,) = validate(index, SPEC._replace(channels=6), batch_size=9)
    assert [(sample.key, "has 5 channels, not 6" in sample.reason) for sample in batch.bad] == [("odd", True)]
    assert batch.images.dtype == (torch.uint8 if wide == np.uint8 else torch.float32)
    assert batch.images.shape == (8, 6, 48, 32)
    top, left, h, w = central_box(60, 70, (48, 32), 0.875)
    for key, image in zip(batch.keys, batch.images, strict=True):
        array = arrays[int(key[-1])]
        pixels = torch.from_numpy(array / np.float32(65535) if array.dtype == np.uint16 else array).permute(2, 0, 1)
        theirs = tv.resized_crop(pixels, top, left, h, w, [48, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        theirs = theirs / 255 if pixels.dtype == torch.uint8 else theirs
        error = (image / (255 if wide == np.uint8 else 1) - theirs).abs().max()
        assert error <= (1.01 / 255 if pixels.dtype == torch.uint8 else 1e-6)


def test_normalization_for_other_channels_equals_timm():
    default = config().for_channels(5)
    for ours, theirs in ((default.mean, config().mean), (default.std, config().std)):
        assert ours == pytest.approx(adapt_to_chs(theirs, 5))
    assert config().for_channels(3) == config()
    assert config(mean=(0.5,), std=(0.1, 0.2)).for_channels(2).mean == (0.5, 0.5)
    with pytest.raises(ConfigError, match=r"data.std is \(0.1, 0.2\); it must be 5 values"):
        config(std=(0.1, 0.2)).for_channels(5)


def test_normalize_equals_torchvision(shards):
    batch = train(open_index(str(shards)))[0]
    mean, std = config().mean, config().std
    theirs = torchvision.transforms.Normalize(mean, std)(batch.images / 255)
    ours = normalize(batch.images, mean, std)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(normalize(batch.images / 255, mean, std), theirs, atol=1e-5)
    assert ours.dtype == torch.float32 and ours.stride() == batch.images.stride()


# --- validation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 7, 1000])
def test_validation_shows_every_sample_once(shards, limit):
    index = open_index(str(shards))
    ranks = [validate(index, rank=rank, world_size=3, limit=limit) for rank in range(3)]
    keys = [key for batches in ranks for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == (7 if limit == 7 else 32)
    if limit == 7:
        assert len({key[0] for key in keys}) >= 4, "spread over the shards"


def test_validation_masks_belong_to_the_sample_name(shards):
    index = open_index(str(shards))
    expected = validate(index)
    loader = val_loader(index, config(workers=1), SPEC, batch_size=5)
    for _ in range(2):  # may be iterated again
        same(list(loader), expected)
    pixels, noise, keys = joined(expected)
    reverse = open_index("::".join(str(path) for path in sorted(shards.glob("*.tar"), reverse=True)))
    moved_pixels, moved_noise, moved = joined(validate(reverse, batch_size=7))
    order = [moved.index(key) for key in keys]
    assert moved != keys
    assert torch.equal(moved_noise[order], noise) and torch.equal(moved_pixels[order], pixels)
    seed = np.frombuffer(hashlib.sha256(b"a/a0").digest()[:16], np.uint64)
    drawn = np.random.Generator(np.random.Philox(key=seed)).random(6, dtype=np.float32)
    assert np.array_equal(noise[keys.index("a/a0")].numpy(), drawn)


def test_names_and_masks_survive_a_move_of_the_data_set(tmp_path, write_tar, encode, photos):
    """Also where shards share file names and samples share keys."""
    shards = {f"{part}/{i}": encode(photos[0].rotate(i)) for i in range(3) for part in ("a", "b")}
    for place in ("here", "there"):
        for name, image in shards.items():
            write_tar(tmp_path / place / f"{name}.tar", [("image.jpg", image)])
    here, there = (open_index(f"{tmp_path}/{place}/a::{tmp_path}/{place}/b") for place in ("here", "there"))
    _, noise, names = joined(validate(here))
    assert names == [f"{part}/{i}/image" for part in ("a", "b") for i in range(3)]
    assert len(noise.unique(dim=0)) == len(names)
    same(validate(there), validate(here))
    assert there.identity() == here.identity()


def test_validation_pixels_equal_timm(tmp_path, write_tar, encode, photos):
    """With short side 256 timm's resize is the identity and the crops are equal to the bit."""
    exact, other = photos[1].resize((400, 256), Image.Resampling.BICUBIC), photos[2]
    write_tar(tmp_path / "v.tar", [("a.jpg", encode(exact)), ("b.jpg", encode(other))])
    index = open_index(str(tmp_path / "v.tar"))
    (batch,) = validate(index, BatchSpec((224, 224), 196))
    transform = timm.data.create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, normalize=False)
    theirs = [transform(Image.open(io.BytesIO(encode(image)))) for image in (exact, other)]
    assert torch.equal(batch.images[0], theirs[0])
    assert (batch.images[1].float() - theirs[1].float()).abs().mean() < 3


# --- bad samples --------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path, write_tar, encode, photos):
    """12 photographs, of which k2 is truncated, k5 is not an image and k6 is empty; and the same undamaged."""
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
    pixels, noise, keys = joined(got)
    good_pixels, good_noise, good_keys = joined(expected)
    for epoch in range(3):
        order = good_keys[12 * epoch : 12 * epoch + 12]
        for position in range(12):
            following = [k for k in order[position:] + order[:position] if k not in ("t/k2", "t/k5", "t/k6")]
            assert keys[12 * epoch + position] == following[0]
    unchanged = [row for row in range(36) if keys[row] == good_keys[row]]
    assert torch.equal(noise, good_noise) and torch.equal(pixels[unchanged], good_pixels[unchanged])
    bad = {sample.key: sample for batch in got for sample in batch.bad}
    assert bad.keys() == {"k2", "k5", "k6"} and "truncated" in bad["k2"].reason
    assert all(sample.shard.endswith("spoiled/t.tar") for sample in bad.values())


def test_bad_samples_are_left_out_of_validation(spoiled):
    index, whole = spoiled
    batches = validate(index, batch_size=3)
    assert [len(batch.keys) for batch in batches] == [2, 2, 2, 3]
    assert [sample.key for batch in batches for sample in batch.bad] == ["k2", "k5", "k6"]
    kept = [i for i in range(12) if i not in (2, 5, 6)]
    assert torch.equal(joined(batches)[0], joined(validate(whole))[0][kept])
    empty = validate(index, batch_size=1)[5]
    assert empty.images.shape == (0, 3, 48, 32) and empty.labels.dtype == torch.int64 and len(empty.bad) == 1


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("image_key", " . "),
    ("shuffle_window_shards", 0),
    ("crop_scale", (0.5, 0.2)),
    ("std", (0.0, 1.0, 1.0)),
    ("cache_gib", 0.0),
    ("max_bad_samples", -1),
])  # fmt: skip
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"data\.{field} is .*; it must be "):
        config(**{field: value})


# --- epochs ---------------------------------------------------------------------------------------------------------


shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(shard_sizes, st.integers(0, 2**40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_order_covers_every_image_within_its_window(sizes, seed, window, repeats, shared):
    starts = np.cumsum([0, *sizes])
    order = EpochOrder(starts, seed, window, repeats)
    total = sum(sizes)
    assert (order.slots, len(order)) == (total // repeats, total // repeats * repeats)
    if not order.slots:
        return
    shown = [order.sample(shared * repeats + e, slot) for e in range(repeats) for slot in range(order.slots)]
    assert len(set(shown)) == len(shown) == order.slots * repeats
    shards = [int(np.searchsorted(starts, sample, side="right")) - 1 for sample in shown]
    for shard in set(shards):  # between a shard's first and last sample only the shards of its window are read
        span = shards[shards.index(shard) : len(shards) - shards[::-1].index(shard)]
        assert len(set(span)) <= window
    again = EpochOrder(starts, seed, window, repeats)
    assert [again.sample(shared * repeats, slot) for slot in range(order.slots)] == shown[: order.slots]
    assert order.sample(shared * repeats, order.slots) == shown[0], "wraps around"
