"""Crops: boxes drawn as torchvision draws them, and antialiased resizing into a batch."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_CROP_ATTEMPTS = 10  # of torchvision's RandomResizedCrop.get_params

CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2
"""Uniform random numbers that `random_box` uses."""


def random_box(
    draws: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return the box of torchvision's `RandomResizedCrop.get_params` for numbers `draws`, (CROP_DRAWS,) in [0, 1).

    `scale` is the smallest and largest area of the box as a fraction of the image, `ratio` the smallest and largest
    width / height, sampled uniformly in its logarithm.
    """
    area, (low, high) = height * width, np.log(ratio)
    for u_area, u_ratio in draws[: 2 * _CROP_ATTEMPTS].reshape(-1, 2).tolist():
        target = area * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = float(np.exp(low + (high - low) * u_ratio))
        w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    h, w = height, width  # central crop of the nearest allowed ratio
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def central_box(height: int, width: int, size: tuple[int, int], crop_pct: float) -> Box:
    """Return the centred box with the shape of `size` that covers `crop_pct` of the image's limiting side.

    Resized to `size` this is timm's evaluation (resize the short side to size / crop_pct, then crop the centre) in
    one resampling instead of two.
    """
    scale = crop_pct * min(height / size[0], width / size[1])
    h, w = (min(limit, max(1, round(scale * side))) for side, limit in zip(size, (height, width), strict=True))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_into(out: Tensor, image: Tensor, box: Box, flip: bool = False) -> None:
    """Crop `image` (H, W, C) to `box` and resize it into `out` (h, w, C) by antialiased bicubic interpolation.

    The batch axis is added to (H, W, C) before the permutation, so that torch sees channels-last strides and does not
    copy the pixels; `[None]` on a (3, H, W) view takes 60 % longer for the same bits. Torch's fast kernels take up to
    four channels, so more are resized in groups of four.
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
