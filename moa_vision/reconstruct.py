"""Pictures of what a MAE does: original | masked | reconstruction, as one grid a step and as single files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

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
    """Reconstruct `images` and write the pictures, each file whole or not at all.

    One channel is shown as grey, of more than three the first three as red, green and blue, of two the first.

    Writes `grid_step_{step:08d}.png` (a row an image, columns as in `KINDS`) and, in place of an earlier step's,
    `{i:02d}_{kind}.png` in the images' own size and `index.json`:
    {"step": int, "images": [{"key", "loss_norm", "loss_pixel", "original", "masked", "reconstruction"}]}.

    Args:
        mae: not wrapped; it is run in evaluation mode and left in the mode it was in.
        images: (N, C, H, W) float, normalized, on the model's device.
        noise: (N, L), fixes each image's mask.
        keys: N names.
        folder: made if missing.
        step: training step of the weights.
        mean, std: the normalization to undo, per channel, for pixels in [0, 1].

    Raises:
        ValueError: the numbers of images, noise rows and keys differ.
    """
    if not len(images) == len(noise) == len(keys):
        raise ValueError(
            f"{len(images)} images, {len(noise)} rows of noise and {len(keys)} keys: must be the same number"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = mae.training
    mae.eval()
    output = mae(images, noise)
    mae.train(training)

    hidden = mae.unpatchify(output.mask.unsqueeze(-1).expand(-1, -1, mae.patchify(images).shape[-1]))[:, :1]
    original = _to_pixels(images, mean, std)
    masked = torch.where(hidden.cpu() > 0, _GREY, original)
    reconstruction = _to_pixels(mae.reconstruct(images, output), mean, std)
    losses = {name: loss.tolist() for name, loss in mae.reconstruction_losses(images, output).items()}

    rows: list[dict[str, Any]] = []
    for i, pictures in enumerate(zip(original, masked, reconstruction, strict=True)):
        names = {kind: f"{i:02d}_{kind}.png" for kind in KINDS}
        for name, picture in zip(names.values(), pictures, strict=True):
            _write(folder / name, _png(picture))
        rows.append({"key": keys[i], **{name: values[i] for name, values in losses.items()}, **names})
    tiles = torch.stack([original, masked, reconstruction], dim=1).flatten(0, 1)
    grid = make_grid(tiles, nrow=len(KINDS), padding=_BORDER, pad_value=1.0)
    _write(folder / f"grid_step_{step:08d}.png", _png(grid))
    _write(folder / "index.json", json.dumps({"step": step, "images": rows}, indent=2).encode())


def _to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized (N, C, H, W) to the float32 pixels in [0, 1], on the CPU, of the one or three channels shown."""
    shape = (-1, 1, 1)
    pixels = (images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]


def _png(picture: Tensor) -> bytes:
    """A picture (1 or 3, H, W) with values in [0, 1] as the bytes of a PNG file."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
