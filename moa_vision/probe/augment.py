"""timm's fine-tuning augmentations with one seed per sample or batch, so that a resumed run repeats them exactly.

timm draws from the global generators of Python and NumPy, whose state is not part of a checkpoint.
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
"""Random numbers per sample from which its seed is derived; each has 24 bits."""


def seed_from(noise: Tensor) -> int:
    """Return a 32-bit seed from a tensor of float32 numbers in [0, 1)."""
    bits = (noise.cpu().flatten().double() * 2**24).long().tolist()
    return int(np.random.SeedSequence(bits).generate_state(1)[0])


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators in a context and restore them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class BatchRandAugment:
    """timm's RandAugment for every image of a batch, in place, for a loader's `collate_fn`.

    `mean` (per channel, for pixels in [0, 1]) fills the corners after a rotation.
    """

    def __init__(self, policy: str, image_size: tuple[int, int], mean: Sequence[float]) -> None:
        hparams = {
            "translate_const": int(min(image_size) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,  # these three as in timm.data.create_transform
            # At magnitude 10 timm posterizes to 0 bits, which Pillow rejects; below 10 it keeps 1 bit.
            "magnitude_max": 9.999,
        }
        self.transform = rand_augment_transform(policy, hparams)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """Transform each image with the seed from its noise.

        Raises:
            DataError: The images have more than 8 bits, which PIL cannot transform.
        """
        if batch.images.dtype != torch.uint8:
            raise DataError("finetune.rand_augment needs 8-bit images; set --finetune.rand_augment null")
        for image, noise in zip(batch.images.permute(0, 2, 3, 1), batch.noise, strict=True):
            pixels = image.squeeze(2)  # PIL's grey images have no channel axis
            with seeded_globals(seed_from(noise)):
                pixels.copy_(torch.from_numpy(np.array(self.transform(Image.fromarray(pixels.numpy())))))
        return batch


class MixingAugment:
    """timm's random erasing, then mixup or cutmix, on normalized images and their labels; see `FinetuneConfig`."""

    def __init__(self, num_classes: int, *, mixup: float, cutmix: float, smoothing: float, erase: float) -> None:
        self.num_classes, self.smoothing, self.erase = num_classes, smoothing, erase
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), changed in place, and soft targets (B, num_classes) float32.

        Args:
            images: (B, C, H, W) float, normalized; B must be even with mixup or cutmix.
            labels: (B,) int64.
            seed: Seed of the batch; None disables mixing and erasing. The noise in erased rectangles is drawn from
                torch's generator, which checkpoints hold.
        """
        if seed is not None:
            with seeded_globals(seed):
                if self.erase > 0:
                    images = RandomErasing(self.erase, mode="pixel", device=str(images.device))(images)
                if self.mixup is not None:
                    return self.mixup(images, labels)
        return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
