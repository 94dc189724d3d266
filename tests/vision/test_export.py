"""The export folder, read by timm's `local-dir:` and by `load_mae`."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moa_ffn import FFN
from moa_vision.export import export_encoder, load_mae
from moa_vision.mae import MAE, create_mae

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
ENCODER: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
DECODER: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}


def make(name: str = "vit_tiny_patch16_qdmoa", img_size: Any = 32, **encoder_args: Any) -> MAE:
    mae = create_mae(name, img_size=img_size, encoder_args={**ENCODER, **encoder_args}, **DECODER).eval()
    with torch.no_grad():  # initial norms would hide that they were not loaded
        for norm in (module for module in mae.modules() if isinstance(module, nn.LayerNorm)):
            norm.weight.add_(torch.randn_like(norm.weight))
            norm.bias.add_(torch.randn_like(norm.bias))
    return mae


def load(folder: Path, **kwargs: Any) -> VisionTransformer:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()
    assert isinstance(model, VisionTransformer)
    return model


def images(height: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[MAE, Path]:
    mae = make()
    export_encoder(mae, tmp_path / "export", MEAN, STD)
    return mae, tmp_path / "export"


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_pooling_and_head(exported, global_pool):
    mae, folder = exported
    model, x = load(folder, global_pool=global_pool, num_classes=10), images(32)
    tokens = mae.encoder.blocks(mae.encoder._pos_embed(mae.encoder.patch_embed(x)))
    pooled = tokens[:, 0] if global_pool == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), mae.encoder.norm(pooled))
    assert model(x).shape == (2, 10)


def test_positions_are_resampled_for_other_image_sizes(tmp_path):
    mae = make(img_size=(24, 48))
    export_encoder(mae, tmp_path / "export", MEAN, STD)
    model = load(tmp_path / "export", img_size=160)
    assert model(images(160)).shape == (2, 32)
    assert mae.encoder.pos_embed is not None and model.pos_embed is not None
    positions = mae.encoder.pos_embed[:, 1:].unflatten(1, mae.grid_size).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(positions, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, 1:], resized.flatten(2).transpose(1, 2))


def test_ffn_settings_are_exported_and_run_settings_are_not(tmp_path):
    settings = {"ffn_mixing_gate": "tanh", "ffn_gate_activations": ["r", "s"], "ffn_up_activations": "id,t,g"}
    mae = make(**settings, ffn_mix_bias=True, drop_path_rate=0.2, proj_drop_rate=0.1, ffn_backend="eager")
    export_encoder(mae, tmp_path / "export", MEAN, STD)
    model, x = load(tmp_path / "export"), images(32)
    assert torch.equal(model.forward_features(x), mae.encoder.forward_features(x))
    for ffn in (module for module in model.modules() if isinstance(module, FFN)):
        assert ffn.spec == mae.encoder.blocks[0].mlp.spec
    model_args = json.loads((tmp_path / "export" / "config.json").read_text())["model_args"]
    assert not {"drop_path_rate", "proj_drop_rate", "ffn_backend"} & model_args.keys()


def test_encoder_without_the_layer_comes_back(tmp_path):
    mae, x = make("deit3_small_patch16_224"), images(32)
    export_encoder(mae, tmp_path / "export", MEAN, STD)
    assert torch.equal(load(tmp_path / "export").forward_features(x), mae.encoder.forward_features(x))


def test_whole_mae_comes_back(tmp_path):
    mae = make(img_size=(16, 48), ffn_mixing_gate="softmax", drop_path_rate=0.1)
    export_encoder(mae, tmp_path / "export", MEAN, STD)
    again = load_mae(tmp_path / "export").eval()
    x, noise = images(*mae.image_size), torch.rand(2, mae.num_patches)
    for ours, theirs in zip(mae(x, noise), again(x, noise), strict=True):
        assert torch.equal(ours, theirs)
    assert again.config == mae.config
    document = json.loads((tmp_path / "export" / "mae.json").read_text())
    assert document["mean"] == list(MEAN) and document["std"] == list(STD)


def test_an_older_export_is_replaced_as_a_whole(exported, monkeypatch):
    _, folder = exported
    (folder / "stale.txt").write_text("old")
    export_encoder(make(), folder, MEAN, STD)
    files = {"config.json", "model.safetensors", "mae.json", "mae.safetensors"}
    assert {path.name for path in folder.parent.iterdir()} == {"export"}
    assert {path.name for path in folder.iterdir()} == files

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("moa_vision.export.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_encoder(make(), folder, MEAN, STD)
    assert {path.name for path in folder.parent.iterdir()} == {"export"}
    assert load(folder).num_classes == 0
