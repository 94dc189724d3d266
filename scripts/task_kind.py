"""Which half, vision or language, a configuration is for, and so which script trains it."""

from collections.abc import Sequence
from pathlib import Path

from moa_train.config import read_config

HERE = Path(__file__).resolve().parent

VISION, LANGUAGE = HERE / "pretrain_mae.py", HERE / "pretrain_lm.py"


def training_script(files: Sequence[Path]) -> Path:
    """Return the script that trains what configuration files, layered in order, describe together.

    A masked autoencoder's `model` has an encoder, a language model's has none.

    Raises:
        ValueError: a file cannot be read, or none of them describes a model.
    """
    trees = [read_config(file) for file in files]
    models = [tree["model"] for tree in trees if isinstance(tree.get("model"), dict)]
    if not models:
        named = ", ".join(map(str, files)) or "nothing"
        raise ValueError(f"--config names {named}; one file at least must describe a model, by keys below 'model'")
    return VISION if any("encoder" in model for model in models) else LANGUAGE
