"""Exported encoders: finding them in run, export and sweep folders, and loading them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moa_train.errors import ConfigError, DataError
from moa_train.manifest import file_sha256
from moa_train.reading import read_json, read_yaml
from moa_vision import vit
from moa_vision.export import save_timm_checkpoint

Pool = Literal["avg", "cls"]
"""Features of an image: the mean of its patch tokens, or its class token."""

_REMEDY = "give the folder of a finished run or an intact export folder"
_MODEL_ARGS = {*inspect.signature(VisionTransformer).parameters, *vit.FFN_ARGUMENTS}


@dataclass(frozen=True, kw_only=True)
class TrainedEncoder:
    """An encoder that `moa_vision.export.export_encoder` wrote.

    Attributes:
        folder: Run folder, or the export folder if there is no run; results are written below it.
        export: Export folder, with config.json and model.safetensors.
        config: Content of config.json.
        data: Data section of the run's configuration; empty without a run.
        step: Training step of the weights; None if unknown.
        channels: Number of image channels.
        image_size: Height and width in pixels.
        mean, std: Normalization per channel, for pixels in [0, 1].
    """

    folder: Path
    export: Path
    config: dict[str, Any]
    data: dict[str, Any]
    step: int | None
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def identity(self) -> dict[str, Any]:
        """Return architecture, step and checksum of the weights."""
        sha256 = file_sha256(self.export / "model.safetensors")
        return {"architecture": self.config["architecture"], "step": self.step, "sha256": sha256}

    def load(self, **arguments: Any) -> VisionTransformer:
        """Return the model with its weights, on the CPU; `arguments` are further ones of `timm.create_model`.

        Raises:
            DataError: config.json and model.safetensors do not describe a vision transformer.
        """
        try:
            model = timm.create_model(f"local-dir:{self.export}", pretrained=True, **arguments)
        except Exception as error:  # timm does not validate arguments and files, so wrong ones can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"timm cannot load the encoder in {self.export} ({reason}); {_REMEDY}") from error
        if not isinstance(model, VisionTransformer):
            raise DataError(f"{self.export} holds a {type(model).__name__}, not a VisionTransformer; {_REMEDY}")
        return model

    def features(self, pool: Pool) -> VisionTransformer:
        """Return the frozen model from images (B, C, H, W) to features (B, D), in evaluation mode.

        The final norm is applied before pooling, as in pre-training.

        Raises:
            ConfigError: `pool` is "cls" and the encoder has no class token.
        """
        if pool == "cls" and not self.config["model_args"].get("class_token", True):
            raise ConfigError("pool is 'cls', but the encoder has no class token; use 'avg'")
        return self.load(num_classes=0, **pooling_arguments(pool)).requires_grad_(False).eval()

    def export_classifier(self, state: dict[str, Tensor], num_classes: int, folder: Path, **arguments: Any) -> None:
        """Write a classifier with `state` around this encoder, as timm's `local-dir:` loads it.

        `arguments` of the architecture, such as global_pool="avg", are added to the encoder's.
        """
        config = self.config | {
            "num_classes": num_classes,
            "model_args": self.config["model_args"] | arguments,
            "pretrained_cfg": self.config["pretrained_cfg"] | {"num_classes": num_classes},
        }
        save_timm_checkpoint(folder, state, config)


def pooling_arguments(pool: Pool) -> dict[str, Any]:
    """Return timm's arguments for features after the final norm."""
    return {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg", "fc_norm": False}


def find_encoders(path: str | Path) -> tuple[list[TrainedEncoder], list[Path]]:
    """Return the encoder of a run or export folder, or those of a sweep folder and its runs without one.

    Raises:
        DataError: `path` holds no encoder.
    """
    path = Path(path)
    runs = sorted(config.parent for config in path.glob("*/config.yaml"))
    if not runs or any((path / name).exists() for name in ("config.yaml", "config.json")):
        return [find_encoder(path)], []
    finished = [run for run in runs if (run / "export" / "model.safetensors").exists()]
    if not finished:
        raise DataError(f"none of the {len(runs)} runs in {path} is finished; give finished runs")
    return [find_encoder(run) for run in finished], [run for run in runs if run not in finished]


def find_encoder(path: str | Path) -> TrainedEncoder:
    """Return the encoder of a run folder or export folder.

    Raises:
        DataError: `path` holds no encoder, or a file in it is invalid.
    """
    path = Path(path)
    inside_run = path.name == "export" and (path.parent / "config.yaml").exists()
    folder = path.parent if inside_run else path
    export = next((place for place in (folder / "export", folder) if (place / "config.json").exists()), None)
    if export is None or not (export / "model.safetensors").exists():
        unfinished = "; the run is not finished, repeat its command to resume it" * (folder / "config.yaml").exists()
        raise DataError(f"{path} holds no exported encoder{unfinished}; {_REMEDY}")
    run, summary = folder / "config.yaml", folder / "summary.json"
    data = (read_yaml(run, _REMEDY) if run.exists() else {}).get("data") or {}
    if not isinstance(data, dict):
        raise DataError(f"{run}: data is {data!r}, expected keys with values; {_REMEDY}")
    step = (read_json(summary, _REMEDY) if summary.exists() else {}).get("steps")
    config = read_json(export / "config.json", _REMEDY)
    try:
        model_args, images = {**config["model_args"]}, {**config["pretrained_cfg"]}
        channels, height, width = map(int, images["input_size"])
        mean, std = (tuple(map(float, images[key])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{export}/config.json lacks a valid value ({error!r}); {_REMEDY}") from error
    # timm also accepts arguments such as checkpoint_path and pretrained_cfg, whose files it unpickles.
    if unknown := set(model_args) - _MODEL_ARGS:
        raise DataError(f"{export}/config.json: model_args has {min(unknown)!r}, not a VisionTransformer argument")
    return TrainedEncoder(
        folder=folder,
        export=export,
        config=config,
        data=data,
        step=step,
        channels=channels,
        image_size=(height, width),
        mean=mean,
        std=std,
    )
