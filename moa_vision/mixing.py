"""Which activations the tokens use: every layer's mixing on a few held-out images, in numbers and as maps.

FOLDER/step_XXXXXXXX.json    each recorded step: the coefficients' spread over all tokens, by layer
FOLDER/index.json            of the last one: what maps.safetensors holds
FOLDER/maps.safetensors      PART.coefficients, PART.shares: (N, layers, L, K) float16; NaN: not computed
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from moa_ffn import FFN
from moa_ffn.mixing_stats import mixing_row
from moa_train.atomic_io import write_bytes, write_json
from moa_vision.mae import MAE


class Maps(NamedTuple):
    """What one part (encoder or decoder) does with N images of L patches, K terms a layer.

    layers: names, such as "encoder.0". terms: names, such as "g·id". token_adaptive: False for learned constants.
    coefficients, shares: (N, layers, L, K) float32, see `FFN.mixing`, `FFN.shares`; NaN: the layer skips the token.
    """

    layers: tuple[str, ...]
    terms: tuple[str, ...]
    token_adaptive: bool
    coefficients: Tensor
    shares: Tensor


@torch.no_grad()
def mixing_maps(mae: MAE, images: Tensor, noise: Tensor) -> dict[str, Maps]:
    """Run the encoder on whole images, the decoder under the mask, and note what every mixing layer does.

    Args:
        mae: not wrapped; it is run in evaluation mode and left in the mode it was in.
        images: (N, C, H, W) float, normalized, on the model's device.
        noise: (N, L), fixes each image's mask.

    Returns:
        Maps by part; a part whose FFNs mix nothing is left out.
    """
    training = mae.training
    mae.eval()
    found: dict[str, Maps] = {}
    prefix = mae.encoder.num_prefix_tokens
    # Not through `mae(...)`: where the model is compiled, that would pass the hooks by.
    with _noted(mae.encoder.blocks) as noted:
        mae.encoder.forward_features(images)
    if noted:
        found["encoder"] = _maps("encoder", noted, lambda values: values[:, prefix:])
    with _noted(mae.decoder_blocks) as noted:
        mae.forward(images, noise)
    if noted:
        order = torch.cat(mae.split(mae.mask_from(noise)), dim=1)  # the decoder's tokens: visible, then masked
        found["decoder"] = _maps("decoder", noted, lambda values: _in_place(values, order))
    mae.train(training)
    return found


def save_mixing(maps: dict[str, Maps], keys: Sequence[str], grid: tuple[int, int], folder: Path, *, step: int) -> None:
    """Write what `mixing_maps` found into `folder` (made if missing), each file whole or not at all.

    Args:
        maps: by part; nothing is written if there is none.
        keys: names of the N images.
        grid: rows and columns of patches.
        folder: where to.
        step: training step of the weights.
    """
    if not maps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": getattr(own, name).half().contiguous()
        for part, own in maps.items()
        for name in ("coefficients", "shares")
    }
    parts = {part: {"layers": own.layers, "coefficients": own.terms} for part, own in maps.items()}
    write_json(folder / f"step_{step:08d}.json", {"step": step, "layers": [*_spread(maps.values())]})
    write_bytes(folder / "maps.safetensors", save(tensors))
    write_json(folder / "index.json", {"step": step, "grid": grid, "keys": [*keys], "parts": parts})


def _spread(maps: Iterable[Maps]) -> Iterator[dict[str, Any]]:
    """One row a layer: of each coefficient over all tokens of all images, and of its term's share."""
    for own in maps:
        for index, layer in enumerate(own.layers):
            tokens, shares = (values[:, index].flatten(0, 1) for values in (own.coefficients, own.shares))
            row = mixing_row(layer, own.terms, own.token_adaptive, tokens, shares)
            if row is not None:
                yield row


class _Noted(NamedTuple):
    ffn: FFN
    layer: int
    coefficients: Tensor  # (N, tokens, K)
    shares: Tensor


@contextmanager
def _noted(blocks: nn.Module) -> Iterator[list[_Noted]]:
    """While entered, every call of a mixing FFN of the blocks is noted, in order."""
    noted: list[_Noted] = []

    def note(index: int, ffn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(ffn, FFN)
        x = inputs[0]
        noted.append(_Noted(ffn, index, ffn.mixing(x).flatten(-2).float(), ffn.shares(x).flatten(-2).float()))

    handles = [
        block.mlp.register_forward_pre_hook(partial(note, index))
        for index, block in enumerate(blocks.children())
        if isinstance(block.mlp, FFN) and block.mlp.spec.num_coefficients
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _maps(part: str, noted: list[_Noted], place: Callable[[Tensor], Tensor]) -> Maps:
    spec = noted[0].ffn.spec
    values = (torch.stack([place(getattr(own, name)) for own in noted], dim=1) for name in ("coefficients", "shares"))
    layers = tuple(f"{part}.{own.layer}" for own in noted)
    return Maps(layers, spec.terms, spec.token_adaptive, *values)


def _in_place(values: Tensor, order: Tensor) -> Tensor:
    """The decoder's values (N, tokens, K), which end as `order` (N, L) does, to (N, L, K) row by row of patches.

    A layer that computes the masked tokens only has fewer than L: the others become NaN.
    """
    values = values[:, -order.shape[1] :]
    where = order[:, -values.shape[1] :].unsqueeze(-1).expand_as(values)
    return values.new_full((*order.shape, values.shape[-1]), torch.nan).scatter(1, where, values)
