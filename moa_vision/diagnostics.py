"""Diagnostics on a few held-out images: reconstructions, and the coefficients of every mixing FFN.

`save_reconstructions` describes its files; those of `save_mixing` are:

FOLDER/step_XXXXXXXX.json    every recorded step: spread of the coefficients over all tokens, by layer
FOLDER/index.json            last step: what maps.safetensors holds
FOLDER/maps.safetensors      PART.coefficients, PART.shares: (N, layers, L, K) float16; NaN = not computed
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from moa_ffn import FFN
from moa_ffn.mixing_stats import mixing_row
from moa_train.atomic_io import write_bytes, write_json, write_text
from moa_vision.mae import MAE

KINDS = ("original", "masked", "reconstruction")
_GREY = 0.5
_BORDER = 4


class Maps(NamedTuple):
    """Mixing of one part (encoder or decoder) on N images of L patches, with K terms per layer.

    Attributes:
        layers: Layer names, such as "encoder.0".
        terms: Term names, such as "g·id".
        token_adaptive: False for constant coefficients.
        coefficients: (N, layers, L, K) float32, see `FFN.mixing`; NaN where the layer skips the token.
        shares: (N, layers, L, K) float32, see `FFN.shares`.
    """

    layers: tuple[str, ...]
    terms: tuple[str, ...]
    token_adaptive: bool
    coefficients: Tensor
    shares: Tensor


@torch.no_grad()
def mixing_maps(mae: MAE, images: Tensor, noise: Tensor) -> dict[str, Maps]:
    """Record the mixing of the encoder on whole images and of the decoder on masked ones.

    Args:
        mae: Model without wrapper; its training mode is restored.
        images: (N, C, H, W) float, normalized, on the model's device.
        noise: (N, L), sets each image's mask.

    Returns:
        Maps by part ("encoder", "decoder"), without parts whose FFNs have no mixing.
    """
    training = mae.training
    mae.eval()
    # Neither call goes through `mae(...)`: a compiled model would skip the hooks.
    with _recording(mae.encoder.blocks) as encoder:
        mae.encoder.forward_features(images)
    with _recording(mae.decoder_blocks) as decoder:
        mae.forward(images, noise)
    mae.train(training)

    found = {}
    if encoder:
        prefix = mae.encoder.num_prefix_tokens
        found["encoder"] = _maps("encoder", encoder, [layer.values[:, :, prefix:] for layer in encoder])
    if decoder:
        order = torch.cat(mae.split(mae.mask_from(noise)), dim=1)
        found["decoder"] = _maps("decoder", decoder, [_by_patch(layer.values, order) for layer in decoder])
    return found


def save_mixing(maps: dict[str, Maps], keys: Sequence[str], grid: tuple[int, int], folder: Path, *, step: int) -> None:
    """Write the files of the N images `keys` at a step, each atomically; without maps nothing is written."""
    if not maps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors, parts, rows = {}, {}, []
    for part, own in maps.items():
        tensors[f"{part}.coefficients"] = own.coefficients.half().contiguous()
        tensors[f"{part}.shares"] = own.shares.half().contiguous()
        parts[part] = {"layers": own.layers, "coefficients": own.terms}
        for index, layer in enumerate(own.layers):
            tokens, shares = (values[:, index].flatten(0, 1) for values in (own.coefficients, own.shares))
            rows.append(mixing_row(layer, own.terms, own.token_adaptive, tokens, shares))
    write_json(folder / f"step_{step:08d}.json", {"step": step, "layers": [row for row in rows if row is not None]})
    write_bytes(folder / "maps.safetensors", save(tensors))
    write_json(folder / "index.json", {"step": step, "grid": grid, "keys": [*keys], "parts": parts})


class _Recorded(NamedTuple):
    layer: int
    ffn: FFN
    values: Tensor  # (2, N, tokens, K) float32: coefficients and shares


@contextmanager
def _recording(blocks: nn.Module) -> Iterator[list[_Recorded]]:
    """Record every call of a mixing FFN in `blocks` while the context is active."""
    recorded: list[_Recorded] = []

    def record(layer: int, ffn: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(ffn, FFN)
        (x,) = inputs
        values = torch.stack([ffn.mixing(x).flatten(-2).float(), ffn.shares(x).flatten(-2).float()])
        recorded.append(_Recorded(layer, ffn, values))

    handles = [
        ffn.register_forward_pre_hook(partial(record, layer))
        for layer, ffn in enumerate(block.mlp for block in blocks.children())
        if isinstance(ffn, FFN) and ffn.spec.num_coefficients
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _maps(part: str, recorded: list[_Recorded], values: list[Tensor]) -> Maps:
    """Stack values (2, N, L, K) per layer."""
    spec = recorded[0].ffn.spec
    coefficients, shares = torch.stack(values, dim=2)
    layers = tuple(f"{part}.{own.layer}" for own in recorded)
    return Maps(layers, spec.terms, spec.token_adaptive, coefficients, shares)


def _by_patch(values: Tensor, order: Tensor) -> Tensor:
    """Sort decoder values (2, N, tokens, K) by patch, (2, N, L, K).

    The last tokens are the patches `order` (N, L): visible, then masked. A layer that computes masked tokens only
    gives NaN for visible ones.
    """
    values = values[:, :, -order.shape[1] :]
    where = order[:, -values.shape[2] :, None].expand_as(values)
    return values.new_full((2, *order.shape, values.shape[-1]), torch.nan).scatter(2, where, values)


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
        mae, images, noise: As in `mixing_maps`.
        keys, step: Names of the N images, and training step of the weights.
        folder: Target, created if missing.
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
    write_text(folder / "index.json", json.dumps({"step": step, "images": rows}, indent=2) + "\n")  # losses may be NaN


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
