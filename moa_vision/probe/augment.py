"""timm's augmentations for fine-tuning, drawn from seeds of their own, so that a run that is resumed sees the same.

timm draws from the global generators of Python and NumPy, which no checkpoint holds. Here both begin at a seed that
belongs to the sample or to the batch, and are put back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from moa_train.errors import DataError
from moa_vision.data import ImageBatch

SEED_NUMBERS = 4
"""Uniform float32 numbers, of 24 bits each, that make up a sample's seed."""


def seed_of(noise: Tensor) -> int:
    """Return 32 bits that follow from any number of float32 numbers in [0, 1)."""
    bits = (noise.double() * 2**24).long().tolist()
    return int(np.random.SeedSequence(bits).generate_state(1)[0])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let Python's and NumPy's global generators begin at `seed`, and put them back on leaving."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


class RandAugmented:
    """timm's RandAugment on every image of a batch, in place; for a loader's `collate_fn`.

    Args:
        policy: timm's notation, e.g. "rand-m9-mstd0.5-inc1".
        image_size: Height and width in pixels.
        mean: Of the data, per channel, for pixels in [0, 1]: what fills the corners that a rotation leaves.
    """

    def __init__(self, policy: str, image_size: tuple[int, int], mean: Sequence[float]) -> None:
        hparams = {
            "translate_const": int(min(image_size) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,  # so far as `timm.data.create_transform` sets them
            # At 10, the top of the scale, timm posterizes to 0 bits, which Pillow refuses; below it keeps 1.
            "magnitude_max": 9.999,
        }
        self.transform = rand_augment_transform(policy, hparams)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Return the batch; each image is transformed by what its noise seeds.

        Raises:
            DataError: The images have more than 8 bits, which PIL does not transform.
        """
        if batch.images.dtype != torch.uint8:
            raise DataError("finetune.rand_augment needs images of 8 bits; give --finetune.rand_augment null")
        for image, noise in zip(batch.images.permute(0, 2, 3, 1), batch.noise, strict=True):
            pixels = image.squeeze(2)  # of one channel, as PIL's grey has it
            with drawing_from(seed_of(noise)):
                pixels.copy_(torch.from_numpy(np.array(self.transform(Image.fromarray(pixels.numpy())))))
        return batch


class Mixing:
    """Random erasing, then mixup or cutmix, of normalized images and their labels; timm's, in its order.

    Args:
        num_classes: Columns of the targets.
        mixup, cutmix: Parameters of their Beta distributions; 0: not used.
        smoothing: Part of a target that is spread evenly over all classes.
        erase: Probability that a rectangle of an image is replaced by noise.
    """

    def __init__(self, num_classes: int, *, mixup: float, cutmix: float, smoothing: float, erase: float) -> None:
        self.num_classes, self.smoothing, self.erase = num_classes, smoothing, erase
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), changed in place, and targets (B, num_classes) float32.

        Args:
            images: (B, C, H, W) float, normalized; B is even where there is mixing.
            labels: (B,) int64.
            seed: Of all that is random but the noise of erased rectangles, which torch's generator draws; None:
                nothing is mixed or erased.
        """
        if seed is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        with drawing_from(seed):
            if self.erase > 0:
                images = RandomErasing(self.erase, mode="pixel", device=str(images.device))(images)
            if self.mixup is not None:
                return self.mixup(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
