"""A trained MAE as a folder: the encoder as timm loads it, beside the whole model with its decoder.

    FOLDER/config.json  model.safetensors    timm.create_model("local-dir:FOLDER", pretrained=True)
    FOLDER/mae.json     mae.safetensors      load_mae("FOLDER")

timm knows our names once `moa_vision` is imported. Without `pretrained=True` it gives random weights and does not say
so.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moa_train.durable import new_folder
from moa_vision.mae import MAE, create_mae

_RUN_ONLY = ("drop_rate", "drop_path_rate", "ffn_backend")
"""Endings of encoder arguments that belong to the training run and not to the weights."""


_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
)
"""What reading a damaged export raises, RecursionError among it: in JSON, in a constructor, in its weights."""


def export_encoder(mae: MAE, folder: str | Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write `folder`, replacing it whole; nothing half-written is ever seen under its name.

    Args:
        mae: built by `create_mae`, not wrapped by a compiler or a data-parallel module.
        folder: where to write.
        mean, std: normalization of the training images, per channel, for images in [0, 1].

    Raises:
        ValueError: `mae` was not built by `create_mae`, so that its arguments are unknown.
    """
    if mae.config is None:
        raise ValueError("export needs a MAE built by create_mae, which keeps its arguments; this one has none")
    with new_folder(Path(folder)) as target:
        _save(mae.encoder, target / "model.safetensors")
        _write_json(target / "config.json", _timm_config(mae, mae.config, mean, std))
        _save(mae, target / "mae.safetensors")
        _write_json(target / "mae.json", {"model": mae.config, "mean": list(mean), "std": list(std)})


def load_mae(folder: str | Path) -> MAE:
    """The MAE that `export_encoder` wrote, with its weights, on the CPU.

    Raises:
        ValueError: `folder` holds no such export, or a damaged one.
    """
    path = Path(folder) / "mae.json"
    try:
        mae = create_mae(**json.loads(path.read_text())["model"])
        mae.load_state_dict(load_file(path.with_name("mae.safetensors")))
    except _FAULTS as error:
        raise ValueError(f"{path} is not an exported MAE ({error!r}); give a run's export folder") from error
    return mae


def _timm_config(mae: MAE, config: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What timm's `local-dir:` and `hf-hub:` read from config.json."""
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


def _save(module: nn.Module, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path, {"format": "pt"})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
