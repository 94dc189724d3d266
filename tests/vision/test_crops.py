"""Crop boxes and resizing equal torchvision's and PIL's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from moa_vision.crops import CROP_DRAWS, crop_into, random_box


def test_crops_equal_torchvision_and_pil(photos):
    generator = np.random.default_rng(0)
    for number in range(24):
        image = torch.from_numpy(np.array(photos[number % 4]))
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
        assert torch.equal(mirrored, ours.flip(1))


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), [
    (256, 341, (0.2, 1.0), (3 / 4, 4 / 3)), (40, 300, (0.5, 1.0), (0.9, 1.1)),
])  # fmt: skip
def test_boxes_have_torchvisions_distribution(height, width, scale, ratio):
    generator = np.random.default_rng(0)
    ours = np.array([random_box(generator.random(CROP_DRAWS), height, width, scale, ratio) for _ in range(4000)])
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(4000)])
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        assert abs(a.mean() - b.mean()) <= 4.5 * np.hypot(a.std(), b.std()) / 4000**0.5
        assert abs(a.std() - b.std()) <= 0.06 * max(a.std(), b.std(), 1)
