"""A trained MAE as a folder: the encoder as timm loads it, beside the whole model with its decoder.

    FOLDER/config.json  model.safetensors    timm.create_model("local-dir:FOLDER", pretrained=True)
    FOLDER/mae.json     mae.safetensors      load_mae("FOLDER")

timm knows our names once `moa_vision` is imported. Without `pretrained=True` it gives random weights and does not say
so.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moa_train.atomic_io import new_folder
from moa_vision.mae import BUILD_FAULTS, MAE, create_mae

_RUN_ONLY = ("drop_rate", "drop_path_rate", "ffn_backend")
"""Endings of encoder arguments that belong to the training run and not to the weights."""

FAULTS = (*BUILD_FAULTS, SafetensorError)
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
    weights = path.with_name("mae.safetensors")
    try:
        arguments = json.loads(path.read_text())["model"]
        depths = (arguments["encoder_args"].get("depth"), arguments.get("decoder_depth"))
        require_same_shapes(lambda: create_mae(**arguments), depths, weights)
        mae = create_mae(**arguments)
        mae.load_state_dict(load_file(weights))
    except FAULTS as error:
        raise ValueError(f"{path} is not an exported MAE ({error!r}); give a run's export folder") from error
    return mae


def require_same_shapes(build: Callable[[], nn.Module], depths: Iterable[int | None], weights: Path) -> None:
    """Raise ValueError unless a model has the tensors of a file; it is not built in memory.

    Damaged arguments can ask for more memory than there is. On the meta device widths cost nothing, but layers are
    objects there too; no model has more of them than tensors.

    Args:
        build: makes the model.
        depths: numbers of its layers, as far as its arguments say them.
        weights: a safetensors file.
    """
    with safe_open(weights, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    for depth in depths:
        if depth is not None and depth > len(found):
            raise ValueError(f"its depth is {depth}, but {weights.name} holds {len(found)} tensors")
    with torch.device("meta"):
        meant = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    if differing := sorted(name for name in found.keys() | meant.keys() if found.get(name) != meant.get(name)):
        name = differing[0]
        raise ValueError(f"{name} has shape {meant.get(name)}, but {found.get(name)} in {weights.name}")


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
