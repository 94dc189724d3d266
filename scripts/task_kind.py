"""The training script of a config: vision or language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa_train.errors import ConfigError
from moa_train.reading import read_yaml

HERE = Path(__file__).resolve().parent

VISION, LANGUAGE = HERE / "pretrain_mae.py", HERE / "pretrain_lm.py"


def training_script(files: Sequence[Path]) -> Path:
    """Return the script that trains the model of config files, layered in order.

    The `model` of a masked autoencoder has an encoder; that of a language model has none.

    Raises:
        ConfigError: No file describes a model.
        DataError: A file cannot be read.
    """
    trees = [read_yaml(file, "--config takes YAML files of keys with values", empty=True) for file in files]
    models = [tree["model"] for tree in trees if isinstance(tree.get("model"), dict)]
    if not models:
        raise ConfigError(f"--config is {', '.join(map(str, files))}; one file at least must have keys below 'model'")
    return VISION if any("encoder" in model for model in models) else LANGUAGE
