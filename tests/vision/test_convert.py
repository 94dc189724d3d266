"""Converted ViTs against timm's and transformers' own models, with random weights."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from moa_train.errors import DataError
from moa_vision.convert import convert, main
from moa_vision.export import load_mae, load_weights
from moa_vision.mae import create_mae
from moa_vision.probe.encoders import find_encoder


@pytest.fixture
def local_timm(tmp_path):
    """Save a random timm model as a `local-dir:` folder and return its name and the model."""

    def save(name: str, **arguments):
        torch.manual_seed(0)
        model = timm.create_model(name, **arguments).eval()
        folder = tmp_path / name
        folder.mkdir()
        config = {"architecture": name, "num_classes": model.num_classes, "model_args": arguments}
        config["pretrained_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "num_classes": model.num_classes}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors")
        return f"local-dir:{folder}", model

    return save


@pytest.mark.parametrize(
    ("name", "arguments", "variant"),
    [
        ("vit_tiny_patch16_224", {}, "moa"),
        ("deit_tiny_patch16_224", {"img_size": 64}, "la"),
        ("vit_small_patch16_224", {"global_pool": "avg", "num_classes": 7}, "moa"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, "moa"),
    ],
)
def test_timm_models_keep_their_function(name, arguments, variant, local_timm, tmp_path):
    source, original = local_timm(name, **arguments)
    assert main([source, "--ffn", variant, "--out", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, *original.patch_embed.img_size)
    torch.testing.assert_close(model(images), original(images), rtol=1e-5, atol=1e-5)
    assert find_encoder(tmp_path / "out").mean == (0.5, 0.4, 0.3)


def official_checkpoint(path, norm_pix_loss: bool) -> Tensor:
    """Save a random GELU MAE in the format of facebookresearch/mae; return its loss on one batch."""
    mae = create_mae(
        "vit_tiny_patch16_gelu", img_size=224, decoder_dim=64, decoder_depth=2, norm_pix_loss=norm_pix_loss
    )
    with torch.no_grad():
        for name, parameter in mae.named_parameters():
            if "pos" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    names = (("encoder.", ""), ("gate_proj", "fc1"), ("down_proj", "fc2"), ("decoder_head", "decoder_pred"))
    state = {}
    for name, value in mae.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if name.startswith("decoder_blocks"):
            name = name.replace(".qkv", ".attn.qkv").replace(".proj", ".attn.proj")
        state[name] = value
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, 64), mae.decoder_pos]).unsqueeze(0)
    torch.save({"model": state}, path)
    return mae(*batch(mae)).loss


def batch(mae) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 224, 224, generator=generator), torch.rand(2, mae.num_patches, generator=generator)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_official_mae_keeps_its_loss(norm_pix_loss, tmp_path):
    loss = official_checkpoint(tmp_path / "mae.pth", norm_pix_loss)
    convert(str(tmp_path / "mae.pth"), "moa", tmp_path / "out", norm_pix_loss=norm_pix_loss)
    mae = load_mae(tmp_path / "out")
    torch.testing.assert_close(mae(*batch(mae)).loss, loss, rtol=1e-6, atol=0)


def test_pretraining_starts_from_converted_weights(local_timm, tmp_path):
    source, _ = local_timm("vit_tiny_patch16_224", global_pool="avg")
    convert(source, "moa", tmp_path / "encoder")
    mae = create_mae("vit_tiny_patch16_moa", img_size=224, encoder_args={"ffn_mix_base": "anchor"})
    decoder = mae.decoder_blocks[0].qkv.weight.clone()
    load_weights(mae, tmp_path / "encoder")
    encoder = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0)
    expected = {name.replace("fc_norm.", "norm."): value for name, value in encoder.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in mae.encoder.state_dict().items())
    assert torch.equal(mae.decoder_blocks[0].qkv.weight, decoder)
    official_checkpoint(tmp_path / "mae.pth", True)
    convert(str(tmp_path / "mae.pth"), "moa", tmp_path / "mae")
    anchored = {"encoder_args": {"ffn_mix_base": "anchor"}}
    whole = create_mae("vit_tiny_patch16_moa", img_size=224, decoder_dim=64, decoder_depth=2, **anchored)
    load_weights(whole, tmp_path / "mae")
    expected = load_mae(tmp_path / "mae").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    with pytest.raises(DataError, match="does not fit the model"):
        load_weights(mae, tmp_path / "mae")
    with pytest.raises(DataError, match=r"has the FFN \(moa.*anchor=gelu\), the model \(moa.*sigmoid\); set"):
        load_weights(create_mae("vit_tiny_patch16_moa", img_size=224), tmp_path / "encoder")


def test_errors_are_one_line(local_timm, tmp_path, capsys):
    source, _ = local_timm("vit_tiny_patch16_224", img_size=32, embed_dim=96)
    (tmp_path / "other.pth").write_bytes(b"text")
    for arguments, message in (
        (["vit_tiny_patch99_224"], "timm cannot load vit_tiny_patch99_224"),
        ([str(tmp_path / "other.pth")], "no checkpoint of facebookresearch/mae"),
        ([source], "width 96 and depth 12 are none of tiny, small, base, large"),
        ([source, "--gate-activations", "s,t"], "needs 'gelu' in gate_activations=silu,tanh"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
