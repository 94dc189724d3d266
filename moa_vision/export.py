"""Export folder of a trained MAE: the encoder as a timm checkpoint, and the whole model with its decoder.

    FOLDER/config.json  model.safetensors    timm.create_model("local-dir:FOLDER", pretrained=True)
    FOLDER/mae.json     mae.safetensors      load_mae("FOLDER")

timm knows the model names once `moa_vision` is imported. Without `pretrained=True` it silently gives random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa_ffn import FFN, VARIANTS, FFNSpec
from moa_train.atomic_io import new_folder, write_json
from moa_train.errors import DataError
from moa_train.reading import read_json
from moa_vision.mae import MAE, create_mae

_RUN_ONLY = ("drop_rate", "drop_path_rate", "ffn_backend")
"""Suffixes of encoder arguments that belong to the training run, not to the weights."""


def export_encoder(mae: MAE, folder: str | Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write the export folder atomically; an older one is replaced.

    Args:
        mae: Model built by `create_mae`, without compiler or data-parallel wrapper.
        folder: Target.
        mean, std: Normalization of the training images per channel, for pixels in [0, 1].

    Raises:
        ValueError: `mae` was not built by `create_mae`.
    """
    if mae.config is None:
        raise ValueError("the export needs a MAE built by create_mae, which stores its arguments in MAE.config")
    with new_folder(Path(folder)) as target:
        save_timm_checkpoint(target, mae.encoder.state_dict(), _timm_config(mae, mae.config, mean, std))
        save_tensors(target / "mae.safetensors", mae.state_dict())
        write_json(target / "mae.json", {"model": mae.config, "mean": list(mean), "std": list(std)})


def load_mae(folder: str | Path) -> MAE:
    """Return the MAE that `export_encoder` wrote, with its weights, on the CPU.

    Raises:
        DataError: `folder` holds no such export, or a damaged one.
    """
    path = Path(folder) / "mae.json"
    document = read_json(path, "give the export folder of a MAE run")
    try:
        mae = create_mae(**document["model"])
        mae.load_state_dict(load_file(path.with_name("mae.safetensors")))
    except Exception as error:  # a damaged file can hold any arguments, and the constructors raise many types
        raise DataError(f"{path} is not a valid MAE export ({type(error).__name__}: {error})") from error
    return mae


def load_weights(mae: MAE, folder: str | Path) -> None:
    """Load the weights of an export folder: those of the whole MAE if it holds one, else those of the encoder.

    Raises:
        DataError: `folder` holds no weights, or they do not fit the model.
    """
    _check_ffn(mae, Path(folder, "config.json"))
    whole, encoder = Path(folder, "mae.safetensors"), Path(folder, "model.safetensors")
    path, module = (whole, mae) if whole.exists() else (encoder, mae.encoder)
    try:
        tensors = load_file(path)
        if module is mae.encoder:
            kept = {name: value for name, value in tensors.items() if not name.startswith("head.")}
            tensors = {name.replace("fc_norm.", "norm."): value for name, value in kept.items()}
        module.load_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give an export folder or one of moa_vision.convert"
        ) from error
    except RuntimeError as error:  # names or shapes
        raise DataError(f"{path} does not fit the model: {' '.join(str(error).split())}") from error


def _check_ffn(mae: MAE, path: Path) -> None:
    """Raise DataError if the exported encoder's FFN has other settings: equal weights would be another function."""
    document = read_json(path, "give an export folder or one of moa_vision.convert")
    ffn = mae.encoder.blocks[0].mlp
    variant = str(document.get("architecture")).rpartition("_")[2]
    if not isinstance(ffn, FFN) or variant not in VARIANTS:
        return
    given = {key.removeprefix("ffn_"): value for key, value in document["model_args"].items()}
    names = [field.name for field in fields(FFNSpec) if field.name in given]
    spec = FFNSpec(variant, **{name: given[name] for name in names})
    if spec != ffn.spec:
        raise DataError(f"{path.parent} has the FFN ({spec}), the model ({ffn.spec}); set model.encoder_args to match")


def save_timm_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write config.json and model.safetensors, as timm's `local-dir:` and `hf-hub:` read them."""
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _timm_config(mae: MAE, config: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Return the content of config.json in timm's format."""
    encoder_args = {key: value for key, value in config["encoder_args"].items() if not key.endswith(_RUN_ONLY)}
    return {
        "architecture": config["encoder_name"],
        "num_classes": 0,
        "num_features": mae.encoder.num_features,
        "model_args": {**encoder_args, "img_size": config["img_size"]},
        "pretrained_cfg": {
            "input_size": [mae.in_chans, *config["img_size"]],
            "fixed_input_size": not encoder_args.get("dynamic_img_size", False),
            "interpolation": "bicubic",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
