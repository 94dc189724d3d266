"""What can be wrong with a checkpoint that is to be evaluated: found early, and said in one line."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

CHECKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModelError(ValueError, SystemExit):
    """A checkpoint or an argument that cannot be evaluated; the message says which one and what to do.

    Catch it as the ValueError that it is. Left uncaught it ends the process as SystemExit does: the message as one
    line on stderr and exit status 1, without a traceback, because `lm_eval`'s command line is not ours to wrap. Of
    several processes each prints it: whichever comes first, the launcher stops the others.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"moa: {message}"


@contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Turn what a library raises for a damaged checkpoint, which can be anything, into a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot {doing}: {lines[0].rstrip(' :')}") from error


def check_folder(pretrained: str, arguments: dict[str, Any]) -> None:
    """Refuse what is meant as a local folder and is none, before anything asks the network for it."""
    path = Path(pretrained).expanduser()
    if not path.is_dir():
        if path.exists() or pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
            raise ModelError(f"checkpoint folder {pretrained} does not exist or is no folder")
        return
    if not (path / (arguments.get("subfolder") or "") / "config.json").is_file() and not arguments.get("gguf_file"):
        adapter = (path / "adapter_config.json").is_file()
        hint = (
            f"it is an adapter: pass pretrained=BASE,peft={pretrained}" if adapter else "name a transformers checkpoint"
        )
        raise ModelError(f"{pretrained} holds no config.json: {hint}")
    _require_safetensors(path / (arguments.get("subfolder") or ""), "model")
    _require_safetensors(Path(arguments.get("peft") or path).expanduser(), "adapter_model")


def _require_safetensors(folder: Path, name: str) -> None:
    """Refuse weights that would be unpickled; an index may name such files too."""
    pickled: list[str] = []
    if not any(folder.glob(f"{name}*.safetensors")):
        pickled += sorted(path.name for path in folder.glob(f"*{name}*.bin"))
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):  # transformers tells
        files = json.loads((folder / f"{name}.safetensors.index.json").read_bytes())["weight_map"].values()
        pickled += [str(file) for file in files if not str(file).endswith(".safetensors")]
    if pickled:
        raise ModelError(
            f"{folder} has its weights in {pickled[0]}, and pickles are not read: convert it to safetensors "
            "(save_pretrained writes them)"
        )


def unknown_argument(name: str, function: Callable[..., Any]) -> str:
    """Name the argument of a function that was probably meant."""
    known = [*inspect.signature(function).parameters][1:-1]
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown model argument {name!r}" + (f": did you mean {close[0]!r}?" if close else "")


def unreadable(folder: Path, error: SafetensorError) -> str:
    """Name the file of a folder that safetensors cannot open."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as reason:
            return f"{path} is truncated or damaged ({reason}): copy or download it again"
    return f"the weights in {folder} cannot be read ({error}): copy or download them again"


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse parameters with NaN or infinity; a sum finds them without a temporary of the weights' size."""
    suspects = [
        (parameter, weight)
        for parameter, weight in model.named_parameters()
        if weight.dtype in CHECKED_DTYPES
        and weight.device.type != "meta"
        and not torch.isfinite(weight.detach().sum(dtype=torch.float32))
    ]
    if broken := [parameter for parameter, weight in suspects if not torch.isfinite(weight).all()]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ModelError(
            f"{name} has weights that are not finite: {broken[0]}{more}; training diverged or the file is damaged, "
            "use an earlier checkpoint"
        )
