"""Mixing maps against the layers called by hand, and the files read back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moa_vision.diagnostics import mixing_maps, save_mixing
from moa_vision.mae import MAE, create_mae

ROWS, COLUMNS, P = 3, 4, 8
SIZES = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 2}


def make(variant: str, **encoder_args) -> MAE:
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": P, **encoder_args}
    return create_mae(f"vit_tiny_patch16_{variant}", img_size=(ROWS * P, COLUMNS * P), encoder_args=args, **SIZES)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, ROWS * P, COLUMNS * P, generator=generator), torch.rand(3, 12, generator=generator)


def test_encoder_maps_are_the_coefficients_of_its_layers(batch):
    mae, (images, noise) = make("qdmoa", reg_tokens=2), batch
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


@pytest.mark.parametrize("variant", ["moa", "bimoa", "qdla"])
def test_shares_add_up_to_one(variant, batch):
    for own in mixing_maps(make(variant), *batch).values():
        total = own.shares.sum(-1)
        torch.testing.assert_close(total[total.isfinite()], torch.ones_like(total[total.isfinite()]))
        assert own.token_adaptive == (variant != "qdla")


def test_models_without_mixing_have_no_maps(batch, tmp_path):
    maps = mixing_maps(make("swiglu"), *batch)
    assert maps == {}
    save_mixing(maps, ["a"], (1, 1), tmp_path / "mixing", step=1)
    assert not (tmp_path / "mixing").exists()


def test_compiled_models_are_recorded_and_keep_their_mode(batch):
    mae = make("qdmoa").train()
    expected = mixing_maps(mae, *batch)
    assert mae.training
    mae.compile(backend="eager")
    mae(*batch)
    for part, own in mixing_maps(mae, *batch).items():
        torch.testing.assert_close(own.coefficients, expected[part].coefficients, equal_nan=True)


def test_files(batch, tmp_path):
    mae, (images, noise) = make("qdmoa"), batch
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
    tokens = tokens[tokens.isfinite().all(1)].double().numpy()
    spread = {"mean": tokens.mean(0), "std": tokens.std(0)}
    spread |= {"low": np.percentile(tokens, 5, axis=0), "high": np.percentile(tokens, 95, axis=0)}
    for key, expected in spread.items():
        assert layers[3][key] == pytest.approx(expected, abs=1e-6)
