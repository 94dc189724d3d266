"""The picture files and their index, read back with PIL and compared with what the model saw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_vision.mae import MAE, create_mae
from moa_vision.reconstruct import save_reconstructions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
P, ROWS, COLUMNS = 8, 3, 4


@pytest.fixture
def mae() -> MAE:
    encoder_args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": P}
    sizes = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}
    return create_mae("vit_tiny_patch16_qdmoa", img_size=(ROWS * P, COLUMNS * P), encoder_args=encoder_args, **sizes)


@pytest.fixture
def pixels() -> torch.Tensor:
    shape = (2, 3, ROWS * P, COLUMNS * P)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float() / 255


def save(mae: MAE, pixels: torch.Tensor, folder: Path, step: int = 7) -> torch.Tensor:
    images = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    noise = torch.rand(2, ROWS * COLUMNS, generator=torch.Generator().manual_seed(1))
    save_reconstructions(mae, images, noise, ["a/0", "b/1"], folder, step=step, mean=MEAN, std=STD)
    return mae.mask_from(noise)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def patch(picture: np.ndarray, index: int) -> np.ndarray:
    row, column = divmod(index, COLUMNS)
    return picture[row * P : (row + 1) * P, column * P : (column + 1) * P]


def test_pictures(mae, pixels, tmp_path):
    mask = save(mae, pixels, tmp_path / "new" / "reconstructions")
    folder = tmp_path / "new" / "reconstructions"
    expected = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(2):
        original, masked, reconstruction = (
            read(folder / f"{i:02d}_{kind}.png") for kind in ("original", "masked", "reconstruction")
        )
        assert np.array_equal(original, expected[i])
        for index, hidden in enumerate(mask[i].tolist()):
            if hidden:
                assert np.all(patch(masked, index) == 128)
                assert not np.array_equal(patch(reconstruction, index), patch(original, index))
            else:
                assert np.array_equal(patch(masked, index), patch(original, index))
                assert np.array_equal(patch(reconstruction, index), patch(original, index))


@pytest.mark.parametrize(("channels", "shown"), [(1, "L"), (2, "L"), (5, "RGB")])
def test_other_numbers_of_channels(channels, shown, tmp_path):
    """Grey as grey; the first three of more, the first of two."""
    encoder_args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": P, "in_chans": channels}
    sizes = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}
    mae = create_mae("vit_tiny_patch16_qdmoa", img_size=2 * P, encoder_args=encoder_args, **sizes)
    pixels = torch.randint(0, 256, (1, channels, 2 * P, 2 * P)).float() / 255
    mean, std = [0.5] * channels, [0.2] * channels
    save_reconstructions(mae, (pixels - 0.5) / 0.2, torch.rand(1, 4), ["a"], tmp_path, step=0, mean=mean, std=std)
    expected = (pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "00_original.png") as image:
        assert image.mode == shown
        assert np.array_equal(np.atleast_3d(np.asarray(image)), expected[..., : len(shown)])
    with Image.open(tmp_path / "00_masked.png") as image:
        assert image.mode == shown and (np.asarray(image) == 128).mean() >= 0.75


def test_index(mae, pixels, tmp_path):
    save(mae, pixels, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["step"] == 7
    assert [row["key"] for row in index["images"]] == ["a/0", "b/1"]
    for row in index["images"]:
        assert set(row) == {"key", "loss_norm", "loss_pixel", "original", "masked", "reconstruction"}
        assert row["loss_norm"] > 0 and row["loss_pixel"] > 0
        assert all((tmp_path / row[kind]).is_file() for kind in ("original", "masked", "reconstruction"))


def test_grid_holds_the_pictures(mae, pixels, tmp_path):
    save(mae, pixels, tmp_path)
    grid = read(tmp_path / "grid_step_00000007.png")
    border, height, width = 4, ROWS * P, COLUMNS * P
    for i in range(2):
        for j, kind in enumerate(("original", "masked", "reconstruction")):
            top, left = border + i * (height + border), border + j * (width + border)
            tile = grid[top : top + height, left : left + width]
            assert np.array_equal(tile, read(tmp_path / f"{i:02d}_{kind}.png"))
    assert grid.shape == (border + 2 * (height + border), border + 3 * (width + border), 3)


def test_a_later_step_replaces_all_but_the_grid(mae, pixels, tmp_path):
    for step in (7, 20):
        save(mae, pixels, tmp_path, step)
    names = {path.name for path in tmp_path.iterdir()}
    grids = {"grid_step_00000007.png", "grid_step_00000020.png"}
    pictures = {f"{i:02d}_{kind}.png" for i in range(2) for kind in ("original", "masked", "reconstruction")}
    assert names == grids | pictures | {"index.json"}
    assert json.loads((tmp_path / "index.json").read_text())["step"] == 20


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(mae, pixels, tmp_path, training):
    save(mae.train(training), pixels, tmp_path)
    assert mae.training is mae.encoder.blocks.training is training
    assert all(parameter.grad is None for parameter in mae.parameters())


def test_numbers_must_agree(mae, pixels, tmp_path):
    with pytest.raises(ValueError, match="2 images, 2 rows of noise and 1 keys"):
        save_reconstructions(mae, pixels, torch.rand(2, 12), ["a"], tmp_path, step=1, mean=MEAN, std=STD)
