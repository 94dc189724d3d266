"""Conversion of trained vision transformers to models of this package that compute the same function.

    python -m moa_vision.convert vit_base_patch16_224.mae --ffn moa --out models/vit_base_moa
    python -m moa_vision.convert mae_visualize_vit_base.pth --ffn moa --out models/mae_base_moa

Sources are timm's ViTs by name, `hf-hub:` or `local-dir:` name, and checkpoints of facebookresearch/mae, with or
without decoder. The folder is one that `moa_vision.export` writes: timm loads it by `local-dir:FOLDER`, pre-training
starts from it by `model.init_from`, and probes take it as the encoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moa_ffn import FFN, FFNSpec, upcycle
from moa_train.atomic_io import new_folder, write_json
from moa_train.errors import ConfigError, DataError, require
from moa_vision.export import save_tensors, save_timm_checkpoint
from moa_vision.mae import MAE, create_mae
from moa_vision.vit import SIZES, VARIANTS, ffn_settings, model_name

TYPE_ONE = tuple(name for name in VARIANTS if not FFNSpec(name).type_two and FFNSpec(name).num_coefficients)
"""Variants that a two-matrix MLP can become."""

_DECODER_NAMES = {
    ".attn.qkv.": ".qkv.",
    ".attn.proj.": ".proj.",
    ".fc1.": ".gate_proj.",
    ".fc2.": ".down_proj.",
    "decoder_pred.": "decoder_head.",
}
"""Names in the decoder of facebookresearch/mae, and here."""


def convert(source: str, variant: str, out: Path, *, norm_pix_loss: bool = True, **settings: Any) -> VisionTransformer:
    """Write the export folder of a converted model and return its encoder.

    Args:
        source: Name of a timm model with weights, or a .pth file of facebookresearch/mae.
        variant: One of `TYPE_ONE`.
        out: New or empty folder.
        norm_pix_loss: Target of a checkpoint with a decoder.
        settings: Other arguments of `moa_ffn.FFN`, such as gate_activations.

    Raises:
        ConfigError: The source is no ViT of a registered size, or `variant` cannot replace its MLP.
        DataError: The weights are missing or do not fit.
    """
    require("--out", str(out), not out.exists() or not any(out.iterdir()), "a new or empty folder")
    require("--ffn", variant, variant in TYPE_ONE, f"one of {', '.join(TYPE_ONE)}; a ViT's MLP has no up branch")
    official = _official_weights(Path(source)) if source.endswith(".pth") else {}
    original = _official_encoder(official) if official else _timm_encoder(source)
    images: dict[str, Any] = original.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    encoder_args = _arguments(original)
    try:
        ffn = next(iter(upcycle(original, variant, **settings).values()))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    encoder_args |= {f"ffn_{key}": value for key, value in ffn_settings(ffn).items() if key != "backend"}
    name = model_name(_size(original), variant)
    img_size = list(original.patch_embed.img_size)
    model = timm.create_model(name, img_size=img_size, num_classes=original.num_classes, **encoder_args)
    assert isinstance(model, VisionTransformer)
    _load(model, original.state_dict(), source)
    mae_tensors = {key: value for key, value in official.items() if key.startswith(("decoder_", "mask_token"))}
    with new_folder(out) as folder:
        save_timm_checkpoint(folder, model.state_dict(), _config(model, name, img_size, encoder_args, images))
        if mae_tensors:
            mae_args = {"encoder_args": encoder_args, "norm_pix_loss": norm_pix_loss, **_decoder(mae_tensors)}
            mae = create_mae(name, img_size=img_size, **mae_args)
            _load(mae, _mae_state(mae, model, mae_tensors), source)
            save_tensors(folder / "mae.safetensors", mae.state_dict())
            write_json(folder / "mae.json", {"model": mae.config, "mean": images["mean"], "std": images["std"]})
    return model


def _timm_encoder(source: str) -> VisionTransformer:
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # timm and the hub raise many types
        raise DataError(f"timm cannot load {source} with weights ({type(error).__name__}: {error})") from error
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{source} is a {type(model).__name__}; a timm VisionTransformer is needed")
    return model.eval()


def _official_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint of facebookresearch/mae; no code in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # a damaged or foreign file
        raise DataError(f"{path} is no checkpoint of facebookresearch/mae ({type(error).__name__}: {error})") from error


def _official_encoder(weights: dict[str, Tensor]) -> VisionTransformer:
    width = weights["cls_token"].shape[-1]
    size = next((size for size, shape in SIZES.items() if shape["embed_dim"] == width), None)
    require("width of the checkpoint", width, size is not None, f"that of a size of {', '.join(SIZES)}")
    model = timm.create_model(f"vit_{size}_patch16_224", num_classes=0, global_pool="token")
    assert isinstance(model, VisionTransformer)
    encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}
    _load(model, encoder, "the checkpoint")
    return model.eval()


def _size(model: VisionTransformer) -> str:
    shape = {"embed_dim": model.embed_dim, "depth": len(model.blocks)}
    for size, known in SIZES.items():
        if shape.items() <= known.items():
            return size
    raise ConfigError(f"width {shape['embed_dim']} and depth {shape['depth']} are none of {', '.join(SIZES)}")


def _arguments(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments of `VisionTransformer` in which timm's ViTs differ, as far as models here support them."""
    block: Any = model.blocks[0]
    arguments = {
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.patch_embed.proj.in_channels,
        "global_pool": model.global_pool,
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }
    defaults = {"patch_size": 16, "in_chans": 3, "global_pool": "token", "class_token": True, "reg_tokens": 0}
    defaults |= {"no_embed_class": False, "qkv_bias": True, "init_values": None, "pre_norm": False, "fc_norm": False}
    return {key: value for key, value in arguments.items() if key not in defaults or value != defaults[key]}


def _decoder(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the sizes of a decoder; facebookresearch/mae has 16 heads in all of them."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("decoder_blocks."))
    return {"decoder_dim": tensors["mask_token"].shape[-1], "decoder_depth": depth, "decoder_heads": 16}


def _mae_state(mae: MAE, encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the MAE: converted encoder, official decoder, mixing as initialized."""
    state = mae.state_dict()
    state |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    for name, value in tensors.items():
        for theirs, ours in _DECODER_NAMES.items():
            name = name.replace(theirs, ours)
        if name != "decoder_pos_embed":  # fixed, and a buffer here
            state[name] = value
    return state


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{source} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error


def _config(
    model: VisionTransformer, name: str, img_size: list[int], encoder_args: dict[str, Any], images: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json in timm's format."""
    kept = {key: images[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode") if key in images}
    return {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {**encoder_args, "img_size": img_size},
        "pretrained_cfg": {
            "input_size": [model.patch_embed.proj.in_channels, *img_size],
            "fixed_input_size": True,
            **kept,
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moa_vision.convert",
        description="Convert a trained ViT to one with a mixture of activations that computes the same function.",
    )
    parser.add_argument("source", metavar="SOURCE", help="timm model name, or FILE.pth of facebookresearch/mae")
    parser.add_argument("--ffn", default="moa", choices=TYPE_ONE, help="variant of the FFN (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--mixing-gate", default="sigmoid", help="gate of the mixture (default: %(default)s)")
    parser.add_argument("--gate-activations", metavar="NAMES", help="dictionary, such as g,s,r2")
    parser.add_argument("--pixel-loss", action="store_true", help="the decoder predicts pixels, not normalized patches")
    options = parser.parse_args(arguments)
    settings = {"mixing_gate": options.mixing_gate}
    if options.gate_activations:
        settings["gate_activations"] = options.gate_activations
    try:
        model = convert(options.source, options.ffn, options.out, norm_pix_loss=not options.pixel_loss, **settings)
    except (ConfigError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    mixing = sum(layer.mixing_parameters() for layer in model.modules() if isinstance(layer, FFN))
    print(f"{options.out}: {mixing:,} mixing parameters added; the function is that of {options.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
