"""A finished run's encoder: where it lies, what it was trained on, and how to load it for a task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moa_train.durable import write_json
from moa_vision import vit
from moa_vision.cache import file_sha256

assert vit.SIZES, "imported so that timm knows our names"

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
    def mean(self) -> tuple[float, float, float]:
        """Mean of its images, per channel, of pixels in [0, 1]."""
        red, green, blue = self.config["pretrained_cfg"]["mean"]
        return red, green, blue

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of its images, per channel, of pixels in [0, 1]."""
        red, green, blue = self.config["pretrained_cfg"]["std"]
        return red, green, blue

    def identity(self) -> dict[str, Any]:
        """Return what tells it from any other encoder: its name, step and weights."""
        sha256 = file_sha256(self.export / "model.safetensors")
        return {"architecture": self.config["architecture"], "step": self.step, "sha256": sha256}

    def load(self, **arguments: Any) -> VisionTransformer:
        """Return the model with its weights, on the CPU; `arguments` are timm's, e.g. num_classes=10."""
        model = timm.create_model(f"local-dir:{self.export}", pretrained=True, **arguments)
        assert isinstance(model, VisionTransformer)
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
    tree = _read(folder / "config.yaml")
    return TrainedEncoder(
        folder=folder,
        export=export,
        config=json.loads((export / "config.json").read_text(encoding="utf-8")),
        data=tree.get("data") or {},
        step=_read(folder / "summary.json").get("steps"),
    )


def _read(path: Path) -> dict[str, Any]:
    """Return a YAML or JSON document, empty where there is none. Raises ValueError naming the file."""
    if not path.exists():
        return {}
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a run's: it holds no keys with values")
    return document
