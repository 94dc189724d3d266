"""Checks of a checkpoint before and after loading, with errors of one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moa_train.errors import DataError

logger = logging.getLogger("lm_eval.models.moa")  # with lm-eval's format and LMEVAL_LOG_LEVEL


class ModelError(DataError, SystemExit):
    """A checkpoint or model argument that cannot be used; the message names it and gives the remedy.

    lm-eval's command line catches no errors. An uncaught ModelError ends the process like SystemExit, with the message
    as one line on stderr and exit status 1. Of several processes each one prints it until the launcher stops them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"moa: {message}"


@contextmanager
def one_line(action: str) -> Iterator[None]:
    """Raise any error of a library as a ModelError of one line; LMEVAL_LOG_LEVEL=DEBUG shows the traceback.

    transformers, tokenizers and safetensors raise errors of many types for damaged files.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        logger.debug("cannot %s", action, exc_info=True)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot {action}: {lines[0].rstrip(' :')}") from error


def check_checkpoint(pretrained: str, arguments: dict[str, Any]) -> None:
    """Check the files of a local checkpoint and its adapter before anything is loaded or downloaded.

    Raises:
        ModelError: A folder or config.json is missing, weights are pickled, or a safetensors file is damaged.
    """
    path = Path(pretrained).expanduser()
    if not path.is_dir():
        if path.exists() or pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
            raise ModelError(f"checkpoint folder {pretrained} does not exist or is not a folder")
        return  # a name on the hub
    folder = path / (arguments.get("subfolder") or "")
    if not (folder / "config.json").is_file() and not arguments.get("gguf_file"):
        is_adapter = (path / "adapter_config.json").is_file()
        remedy = f"it is an adapter, pass pretrained=BASE,peft={pretrained}" if is_adapter else "pass a checkpoint"
        raise ModelError(f"{pretrained} has no config.json: {remedy}")
    _check_weights(folder, "model")
    _check_weights(Path(arguments.get("peft") or path).expanduser(), "adapter_model")


def _check_weights(folder: Path, name: str) -> None:
    files = sorted(folder.glob(f"{name}*.safetensors"))
    pickled = [] if files else sorted(path.name for path in folder.glob(f"*{name}*.bin"))
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        with one_line(f"read {index}"):
            named = {str(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
        pickled += sorted(file for file in named if not file.endswith(".safetensors"))
    if pickled:
        raise ModelError(f"{folder} has pickled weights ({pickled[0]}): convert them to safetensors by save_pretrained")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or damaged ({error}): copy or download it again") from error


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Check that all parameters are finite. A sum needs no temporary of the weights' size.

    Raises:
        ModelError: A parameter has NaN or infinity.
    """
    for parameter, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.itemsize == 1 or weight.is_meta:
            continue  # quantized or offloaded
        if not weight.detach().sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise ModelError(
                f"{name} has NaN or infinity in {parameter}: training diverged or the file is damaged, use an earlier "
                "checkpoint"
            )
