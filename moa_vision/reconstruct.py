"""Reconstruction diagnostics: original, masked and reconstructed images as a grid per step and as single files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from moa_train.atomic_io import write_bytes, write_text
from moa_vision.mae import MAE

KINDS = ("original", "masked", "reconstruction")
_GREY = 0.5
_BORDER = 4


@torch.no_grad()
def save_reconstructions(
    mae: MAE,
    images: Tensor,
    noise: Tensor,
    keys: Sequence[str],
    folder: str | Path,
    *,
    step: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Reconstruct `images` and write PNG files, each atomically.

    `grid_step_{step:08d}.png` has a row per image and the columns of `KINDS`. `{i:02d}_{kind}.png`, in the images' own
    size, and `index.json` replace those of an earlier step:
    {"step": int, "images": [{"key", "loss_norm", "loss_pixel", "original", "masked", "reconstruction"}]}.
    Images with one or two channels show the first as grey; with more than three, the first three as RGB.

    Args:
        mae, images, noise: As in `moa_vision.mixing.mixing_maps`.
        keys: Names of the N images.
        folder: Target, created if missing.
        step: Training step of the weights.
        mean, std: Normalization per channel, for pixels in [0, 1].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = mae.training
    mae.eval()
    output = mae(images, noise)
    mae.train(training)

    hidden = mae.unpatchify(output.mask.unsqueeze(-1).expand(-1, -1, mae.patchify(images).shape[-1]))[:, :1]
    original = _displayed(images, mean, std)
    masked = torch.where(hidden.cpu() > 0, _GREY, original)
    reconstruction = _displayed(mae.reconstruct(images, output), mean, std)
    losses = {name: loss.tolist() for name, loss in mae.reconstruction_losses(images, output).items()}

    rows: list[dict[str, Any]] = []
    for i, (key, *pictures) in enumerate(zip(keys, original, masked, reconstruction, strict=True)):
        names = {kind: f"{i:02d}_{kind}.png" for kind in KINDS}
        for name, picture in zip(names.values(), pictures, strict=True):
            write_bytes(folder / name, _png(picture))
        rows.append({"key": key, **{name: values[i] for name, values in losses.items()}, **names})
    tiles = torch.stack([original, masked, reconstruction], dim=1).flatten(0, 1)
    grid = make_grid(tiles, nrow=len(KINDS), padding=_BORDER, pad_value=1.0)
    write_bytes(folder / f"grid_step_{step:08d}.png", _png(grid))
    write_text(folder / "index.json", json.dumps({"step": step, "images": rows}, indent=2) + "\n")


def _displayed(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the displayed channels (N, 1 or 3, H, W) of normalized images: float32 in [0, 1], on the CPU."""
    shape = (-1, 1, 1)
    pixels = (images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]


def _png(picture: Tensor) -> bytes:
    """Encode a picture (1 or 3, H, W) with values in [0, 1]."""
    buffer = io.BytesIO()
    to_pil_image((picture * 255).round().to(torch.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
