"""The reconstruction files, read back with PIL and compared with the model's input and mask."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_vision.diagnostics import KINDS, save_reconstructions
from moa_vision.mae import MAE, create_mae

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
P, ROWS, COLUMNS = 8, 3, 4


def make(channels: int = 3) -> MAE:
    encoder_args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": P, "in_chans": channels}
    sizes = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}
    return create_mae("vit_tiny_patch16_qdmoa", img_size=(ROWS * P, COLUMNS * P), encoder_args=encoder_args, **sizes)


def random_pixels(channels: int = 3) -> torch.Tensor:
    shape = (2, channels, ROWS * P, COLUMNS * P)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float() / 255


def save(mae: MAE, pixels: torch.Tensor, folder: Path, step: int = 7) -> torch.Tensor:
    mean, std = (MEAN, STD) if pixels.shape[1] == 3 else ([0.5] * pixels.shape[1], [0.2] * pixels.shape[1])
    images = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    noise = torch.rand(2, ROWS * COLUMNS, generator=torch.Generator().manual_seed(1))
    save_reconstructions(mae, images, noise, ["a/0", "b/1"], folder, step=step, mean=mean, std=std)
    return mae.mask_from(noise)


def read(path: Path, mode: str = "RGB") -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == mode
        return np.asarray(image)


def patch(picture: np.ndarray, index: int) -> np.ndarray:
    row, column = divmod(index, COLUMNS)
    return picture[row * P : (row + 1) * P, column * P : (column + 1) * P]


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
                assert not np.array_equal(patch(reconstruction, index), patch(original, index))
            else:
                assert np.array_equal(patch(masked, index), patch(original, index))
                assert np.array_equal(patch(reconstruction, index), patch(original, index))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (5, "RGB")])
def test_other_numbers_of_channels(channels, mode, tmp_path):
    pixels = random_pixels(channels)
    save(make(channels), pixels, tmp_path)
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
    grid = read(tmp_path / "grid_step_00000020.png")
    border, height, width = 4, ROWS * P, COLUMNS * P
    assert grid.shape == (border + 2 * (height + border), border + 3 * (width + border), 3)
    for i, row in enumerate(index["images"]):
        assert row["loss_norm"] > 0 and row["loss_pixel"] > 0
        for j, kind in enumerate(KINDS):
            top, left = border + i * (height + border), border + j * (width + border)
            assert np.array_equal(grid[top : top + height, left : left + width], read(tmp_path / row[kind]))
