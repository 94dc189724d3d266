"""Mixing maps and reconstructions against the model called by hand, and the files read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moa_vision.diagnostics import KINDS, mixing_maps, save_mixing, save_reconstructions
from moa_vision.mae import MAE, create_mae

ROWS, COLUMNS, P = 3, 4, 8
SIZES = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 2}


def make(variant: str = "qdmoa", **encoder_args) -> MAE:
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": P, **encoder_args}
    return create_mae(f"vit_tiny_patch16_{variant}", img_size=(ROWS * P, COLUMNS * P), encoder_args=args, **SIZES)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, ROWS * P, COLUMNS * P, generator=generator), torch.rand(3, 12, generator=generator)


# --- mixing ---------------------------------------------------------------------------------------------------------


def test_encoder_maps_are_the_coefficients_of_its_layers(batch):
    mae, (images, noise) = make(reg_tokens=2), batch
    maps = mixing_maps(mae, images, noise)["encoder"]
    assert maps.layers == ("encoder.0", "encoder.1")
    assert maps.terms == ("g·id", "g·t", "s·id", "s·t", "r2·id", "r2·t")
    encoder = mae.encoder.eval()
    x = encoder._pos_embed(encoder.patch_embed(images))
    for index, block in enumerate(encoder.blocks):
        x = x + block.attn(block.norm1(x))
        own = block.norm2(x)[:, 3:]  # without class token and registers
        torch.testing.assert_close(maps.coefficients[:, index], block.mlp.mixing(own).flatten(-2))
        torch.testing.assert_close(maps.shares[:, index], block.mlp.shares(own).flatten(-2))
        x = x + block.mlp(block.norm2(x))


def test_decoder_maps_are_sorted_by_patch(batch):
    mae, (images, noise) = make("onemoa"), batch
    for block in mae.decoder_blocks:  # coefficients that depend on the first channel only
        block.mlp.mix_proj.weight.data.zero_()
        block.mlp.mix_proj.weight.data[:, 0] = 1.0
    seen = []
    mae.decoder_blocks[0].norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    maps = mixing_maps(mae, images, noise)["decoder"]
    order = torch.cat(mae.split(mae.mask_from(noise)), 1)
    for image in range(3):
        for token, patch in enumerate(order[image].tolist()):
            expected = seen[0][image, 1 + token, 0].sigmoid()
            torch.testing.assert_close(maps.coefficients[image, 0, patch], expected.expand(3))
    last, hidden = maps.coefficients[:, 1], mae.mask_from(noise).bool()
    assert last[~hidden].isnan().all() and last[hidden].isfinite().all()


def test_models_without_mixing_have_no_maps(batch, tmp_path):
    maps = mixing_maps(make("swiglu"), *batch)
    assert maps == {}
    save_mixing(maps, ["a"], (1, 1), tmp_path / "mixing", step=1)
    assert not (tmp_path / "mixing").exists()


def test_compiled_models_are_recorded_and_keep_their_mode(batch):
    mae = make("qdla").train()
    expected = mixing_maps(mae, *batch)
    assert mae.training and not any(own.token_adaptive for own in expected.values())
    mae.compile(backend="eager")
    mae(*batch)
    for part, own in mixing_maps(mae, *batch).items():
        torch.testing.assert_close(own.coefficients, expected[part].coefficients, equal_nan=True)


def test_mixing_files(batch, tmp_path):
    mae, (images, noise) = make(), batch
    maps = mixing_maps(mae, images, noise)
    for step in (5, 10):
        save_mixing(maps, ["a", "b", "c"], mae.grid_size, tmp_path, step=step)
    names = {"index.json", "maps.safetensors", "step_00000005.json", "step_00000010.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["step"], index["grid"], index["keys"]) == (10, [ROWS, COLUMNS], ["a", "b", "c"])
    tensors = load_file(tmp_path / "maps.safetensors")
    for part, own in maps.items():
        assert index["parts"][part] == {"layers": list(own.layers), "coefficients": list(own.terms)}
        for name in ("coefficients", "shares"):
            written, expected = tensors[f"{part}.{name}"], getattr(own, name).half()
            torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)
    layers = json.loads((tmp_path / "step_00000010.json").read_text())["layers"]
    assert [row["layer"] for row in layers] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    tokens = maps["decoder"].coefficients[:, 1].flatten(0, 1)
    tokens = tokens[tokens.isfinite().all(1)].double()
    assert layers[3]["mean"] == pytest.approx(tokens.mean(0), abs=1e-6), "tokens that a layer skips do not count"


# --- reconstructions ------------------------------------------------------------------------------------------------


def save(mae: MAE, pixels: torch.Tensor, folder: Path, step: int = 7) -> torch.Tensor:
    """Save reconstructions of pixels in [0, 1], and return the mask."""
    mean, std = [0.5] * pixels.shape[1], [0.2] * pixels.shape[1]
    noise = torch.rand(2, ROWS * COLUMNS, generator=torch.Generator().manual_seed(1))
    save_reconstructions(mae, (pixels - 0.5) / 0.2, noise, ["a/0", "b/1"], folder, step=step, mean=mean, std=std)
    return mae.mask_from(noise)


def random_pixels(channels: int = 3) -> torch.Tensor:
    shape = (2, channels, ROWS * P, COLUMNS * P)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float() / 255


def patch(picture: np.ndarray, index: int) -> np.ndarray:
    row, column = divmod(index, COLUMNS)
    return picture[row * P : (row + 1) * P, column * P : (column + 1) * P]


def read(path: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == mode
        return np.asarray(image)


def test_only_masked_patches_change(tmp_path):
    pixels = random_pixels()
    mask = save(make(), pixels, tmp_path / "new")
    expected = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(2):
        original, masked, reconstruction = (read(tmp_path / "new" / f"{i:02d}_{kind}.png") for kind in KINDS)
        assert np.array_equal(original, expected[i])
        for index, hidden in enumerate(mask[i].tolist()):
            if hidden:
                assert np.all(patch(masked, index) == 128)
            else:
                assert np.array_equal(patch(masked, index), patch(original, index))
            same = np.array_equal(patch(reconstruction, index), patch(original, index))
            assert same != bool(hidden)


@pytest.mark.parametrize(("channels", "mode"), [(2, "L"), (5, "RGB")])
def test_other_numbers_of_channels(channels, mode, tmp_path):
    pixels = random_pixels(channels)
    save(make(in_chans=channels), pixels, tmp_path)
    expected = (pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()[..., : len(mode)]
    assert np.array_equal(np.atleast_3d(read(tmp_path / "00_original.png", mode)), expected)
    assert (read(tmp_path / "00_masked.png", mode) == 128).mean() >= 0.75


def test_grid_and_index(tmp_path):
    mae = make().train()
    for step in (7, 20):
        save(mae, random_pixels(), tmp_path, step)
    assert mae.training and mae.encoder.blocks.training
    grids = {"grid_step_00000007.png", "grid_step_00000020.png"}
    pictures = {f"{i:02d}_{kind}.png" for i in range(2) for kind in KINDS}
    assert {path.name for path in tmp_path.iterdir()} == grids | pictures | {"index.json"}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["step"] == 20 and [row["key"] for row in index["images"]] == ["a/0", "b/1"]
    grid, border = read(tmp_path / "grid_step_00000020.png"), 4
    for i, row in enumerate(index["images"]):
        assert row["loss_norm"] > 0 and row["loss_pixel"] > 0
        for j, kind in enumerate(KINDS):
            top, left = border + i * (ROWS * P + border), border + j * (COLUMNS * P + border)
            assert np.array_equal(grid[top : top + ROWS * P, left : left + COLUMNS * P], read(tmp_path / row[kind]))
