"""A finished run's encoder: where it lies, what it was trained on, and how to load it for a task."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moa_train.atomic_io import write_json
from moa_train.manifest import file_sha256
from moa_train.reading import read_json, read_yaml
from moa_vision import vit
from moa_vision.export import FAULTS, require_same_shapes

_REMEDY = "give a finished run's folder or an export folder that is whole"
_DATA = {
    "train": str,
    "val": str,
    "image_key": str,
    "val_crop_pct": (int, float),
    "workers": int,
    "cache_dir": str,
    "cache_gib": (int, float),
    "max_bad_samples": int,
}
_MODEL_ARGS = {*inspect.signature(VisionTransformer).parameters, *vit.FFN_ARGUMENTS}

Pool = Literal["avg", "cls"]
"""What stands for an image: the mean of its patch tokens, or its class token."""


@dataclass(frozen=True, kw_only=True)
class TrainedEncoder:
    """An encoder that `moa_vision.export.export_encoder` wrote.

    Attributes:
        folder: The run folder, or the export folder where there is no run around it; results go below it.
        export: The export folder: config.json and model.safetensors.
        config: What config.json holds.
        data: The run's data section; empty without a run.
        step: The step that the encoder is of; None where nothing says so.
    """

    folder: Path
    export: Path
    config: dict[str, Any]
    data: dict[str, Any]
    step: int | None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        height, width = self.config["pretrained_cfg"]["input_size"][1:]
        return height, width

    @property
    def channels(self) -> int:
        """Number of channels of its images."""
        return self.config["pretrained_cfg"]["input_size"][0]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of its images, per channel, of pixels in [0, 1]."""
        return tuple(self.config["pretrained_cfg"]["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of its images, per channel, of pixels in [0, 1]."""
        return tuple(self.config["pretrained_cfg"]["std"])

    def identity(self) -> dict[str, Any]:
        """Return what tells it from any other encoder: its name, step and weights."""
        sha256 = file_sha256(self.export / "model.safetensors")
        return {"architecture": self.config["architecture"], "step": self.step, "sha256": sha256}

    def load(self, **arguments: Any) -> VisionTransformer:
        """Return the model with its weights, on the CPU; `arguments` are timm's, e.g. num_classes=10.

        Raises:
            ValueError: config.json and model.safetensors do not make one.
        """
        try:
            own = {"num_classes": self.config.get("num_classes", 0), **self.config["model_args"]}
            weights = self.export / "model.safetensors"
            require_same_shapes(
                lambda: timm.create_model(self.config["architecture"], **own), [own.get("depth")], weights
            )
            model = timm.create_model(f"local-dir:{self.export}", pretrained=True, **arguments)
        except FAULTS as error:
            raise ValueError(f"{self.export} holds no encoder that can be loaded ({error!r}); {_REMEDY}") from error
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"{self.export} holds a {type(model).__name__}, not a vision transformer; {_REMEDY}")
        return model

    def features(self, pool: Pool) -> VisionTransformer:
        """Return the frozen model in evaluation mode: images (B, C, H, W) -> features (B, D).

        The last norm comes before the pooling, as in pre-training.

        Raises:
            ValueError: `pool` is "cls" and the encoder has no class token.
        """
        pooling = {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg", "fc_norm": False}
        if pool == "cls" and not self.config["model_args"].get("class_token", True):
            raise ValueError("pool is 'cls', but the encoder has no class token; it must be 'avg'")
        return self.load(num_classes=0, **pooling).requires_grad_(False).eval()

    def export_classifier(self, state: dict[str, Tensor], num_classes: int, folder: Path, **arguments: Any) -> None:
        """Write the weights of a classifier around this encoder into `folder`, as timm's `local-dir:` loads them.

        Args:
            state: The state dict of this architecture with `num_classes` outputs.
            num_classes: Outputs of the head.
            folder: An empty folder.
            arguments: Of the architecture, beyond the encoder's own, e.g. global_pool="avg".
        """
        config = self.config | {
            "num_classes": num_classes,
            "model_args": self.config["model_args"] | arguments,
            "pretrained_cfg": self.config["pretrained_cfg"] | {"num_classes": num_classes},
        }
        write_json(folder / "config.json", config)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def find_encoders(path: str | Path) -> tuple[list[TrainedEncoder], list[Path]]:
    """Return the encoder of a run folder or of an export folder; of a sweep's folder, those of all its runs, by name.

    The second list holds the sweep's runs that have none: not finished, or diverged.

    Raises:
        ValueError: `path` is neither, or no run of the sweep has an encoder.
    """
    path = Path(path)
    runs = sorted(config.parent for config in path.glob("*/config.yaml"))
    if not runs or any((path / name).exists() for name in ("config.yaml", "config.json")):
        return [find_encoder(path)], []
    finished = [run for run in runs if (run / "export" / "model.safetensors").exists()]
    if not finished:
        raise ValueError(f"none of the {len(runs)} runs in {path} is finished; give finished ones")
    return [find_encoder(run) for run in finished], [run for run in runs if run not in finished]


def find_encoder(path: str | Path) -> TrainedEncoder:
    """Return the encoder of a run folder or of an export folder.

    Raises:
        ValueError: `path` is neither; the message says what to do.
    """
    path = Path(path)
    inside_run = path.name == "export" and (path.parent / "config.yaml").exists()
    folder = path.parent if inside_run else path
    export = next((place for place in (folder / "export", folder) if (place / "config.json").exists()), None)
    if export is None or not (export / "model.safetensors").exists():
        unfinished = " (the run has not been finished: the command that started it continues it)"
        hint = unfinished if (folder / "config.yaml").exists() else ""
        raise ValueError(f"{path} holds no exported encoder{hint}; give a finished run's folder or an export folder")
    run, summary = folder / "config.yaml", folder / "summary.json"
    data = (read_yaml(run, _REMEDY) if run.exists() else {}).get("data") or {}
    step = (read_json(summary, _REMEDY) if summary.exists() else {}).get("steps")
    _require_data(run, data)
    if step is not None and type(step) is not int:
        raise ValueError(f"{summary}: steps is {step!r}, not a number of steps; {_REMEDY}")
    config = read_json(export / "config.json", _REMEDY)
    _require_config(export / "config.json", config)
    return TrainedEncoder(folder=folder, export=export, config=config, data=data, step=step)


def _require_data(path: Path, data: Any) -> None:
    """Raise ValueError naming what of a run's data section cannot be: the keys that a probe takes from it."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: data is {data!r}, not keys with values; {_REMEDY}")
    for key, kind in _DATA.items():
        value = data.get(key)
        if value is None:
            continue
        fits = isinstance(value, kind) and (isinstance(value, str) or abs(value) < 2**63)
        if not fits or isinstance(value, bool):
            raise ValueError(f"{path}: data.{key} is {value!r}; {_REMEDY}")


def _require_config(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError naming what of an export's config.json cannot be, as far as it is not left to timm."""
    name, images = config.get("architecture"), config.get("pretrained_cfg")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{path}: architecture is {name!r}, not a model that timm knows; {_REMEDY}")
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}, not keys with values; {_REMEDY}")
    # timm would take others too: checkpoint_path and pretrained_cfg name files, which it unpickles.
    if unknown := set(config["model_args"]) - _MODEL_ARGS:
        raise ValueError(f"{path}: model_args has {min(unknown)!r}, no argument of a vision transformer; {_REMEDY}")
    assert isinstance(images, dict)
    size = images.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{path}: input_size is {size!r}, not channels, height and width; {_REMEDY}")
    for key, least in (("mean", -math.inf), ("std", 0)):
        values = images.get(key)
        if not isinstance(values, list) or [_is_number(v) and v > least for v in values] != [True] * size[0]:
            raise ValueError(f"{path}: {key} is {values!r}, not a number of each of {size[0]} channels; {_REMEDY}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
