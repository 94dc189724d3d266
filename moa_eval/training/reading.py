"""A run folder, read and checked. The only place that knows the folder's file names and keys."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from moa_eval.training.runs import AUTOENCODER, FINITE, LANGUAGE_MODEL, Columns, Kind, Probe, Reconstruction, Run

_OPTIONAL = {"train": ("epoch", "lr", "throughput", "mfu"), "val": ("epoch",)}  # columns that a row may lack
_CONFIG_KEYS = {"name": str, "seed": int, "optim.lr": int | float}  # what a page cannot do without
_TILES = ("original", "masked", "reconstruction")
_YAML_FAULTS = (ValueError, RecursionError, AttributeError, LookupError, TypeError, OverflowError)  # of misfits
_REMEDY = "restore the file or leave this run out"


class RunFolderError(ValueError):
    """A run folder is missing, incomplete or broken; the message is one line that names the file and the remedy."""


def read_run(folder: str | Path) -> Run:
    """Read and check one run folder.

    Raises:
        RunFolderError: A file is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise broken(folder, "no such folder", "give the folder that training wrote (it holds config.yaml)")
    config, kind = _read_config(folder / "config.yaml")
    rows = _read_metrics(folder / "metrics.jsonl", kind)
    reconstructions, step = _read_reconstructions(folder / "reconstructions" / "index.json")
    return Run(
        kind=kind,
        folder=folder,
        config=config,
        environment=read_json(folder / "env.json"),
        train=_columns(rows, "train", kind, folder / "metrics.jsonl"),
        validation=_columns(rows, "val", kind, folder / "metrics.jsonl"),
        summary=read_json(folder / "summary.json") if (folder / "summary.json").exists() else {},
        reconstructions=reconstructions,
        reconstructions_step=step,
        probes=tuple(_read_probe(path) for path in sorted((folder / "probe").glob("*.json"))),
    )


def find_runs(folder: str | Path) -> list[Path]:
    """The run folder itself, or the run folders that a folder holds (a sweep's), ordered by name.

    Raises:
        RunFolderError: It is neither.
    """
    folder = Path(folder)
    if not folder.is_dir() or (folder / "config.yaml").exists():
        return [folder]  # `read_run` says what is wrong with it, if anything is
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise broken(folder, "neither a run folder nor a folder of run folders", "is config.yaml missing?")
    return found


def broken(path: Path, reason: object, remedy: str = _REMEDY) -> RunFolderError:
    """The error of a file of a run folder: which one, what is wrong with it, and what to do."""
    return RunFolderError(f"{path}: {' '.join(str(reason).split())}; {remedy}")  # on one line, whatever a parser said


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise broken(path, "missing", f"is {path.parent} a run folder, and has its training started?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise broken(path, f"cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run folder that holds a JSON object.

    Raises:
        RunFolderError: It is missing or broken.
    """
    try:
        content = parse_json(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, RunFolderError) else broken(path, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise broken(path, f"holds a {type(content).__name__}, not an object")
    return content


def parse_json(text: str) -> Any:
    """Read JSON whose numbers all fit into a float, and whose text can all be written into a page.

    Raises:
        ValueError: It is no JSON, or holds half a surrogate pair.
        RecursionError: It is nested too deeply.
    """
    content = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _read_config(path: Path) -> tuple[dict[str, Any], Kind]:
    text = _read_text(path)
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("aliases, which a resolved configuration does not have")
        config = yaml.safe_load(text)
        json.dumps(config, ensure_ascii=False, default=str).encode()
    except (yaml.YAMLError, *_YAML_FAULTS) as error:
        raise broken(path, f"not valid YAML ({error})") from None
    kind = LANGUAGE_MODEL if isinstance(_look_up(config, LANGUAGE_MODEL.ffn_key), str) else AUTOENCODER
    for key, wanted in (_CONFIG_KEYS | {kind.ffn_key: str}).items():
        value = _look_up(config, key)
        fits = not isinstance(value, int | float) or abs(value) < 2**63  # a NaN is no rate
        if not isinstance(value, wanted) or isinstance(value, bool) or not fits:
            raise broken(path, f"has no usable {key} (found {value!r})", "is it the config that training resolved?")
    return config, kind


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _read_metrics(path: Path, kind: Kind) -> list[dict[str, Any]]:
    lines = _read_text(path).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline yet: a run that is being written, or was killed while writing
                break
            raise broken(path, f"line {number} is not valid JSON ({error})", "delete that line") from None
        if reason := _row_fault(row, kind):
            raise broken(path, f"line {number} {reason}", "delete that line or leave this run out")
        rows.append(row)
    return rows


def _row_fault(row: Any, kind: Kind) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return "has no 'kind'"
    required = kind.required.get(row["kind"], ())
    for key in (*required, *_OPTIONAL.get(row["kind"], ())):
        value = row.get(key)
        if value is None and (key not in required or (key in row and key in FINITE)):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"({row['kind']}) has no number '{key}' (found {value!r})"
        if key in required and key not in FINITE and not math.isfinite(value):
            return f"({row['kind']}) has a '{key}' that is not finite"
    return None


def _columns(rows: list[dict[str, Any]], row_kind: str, kind: Kind, path: Path) -> Columns:
    # A run that was killed after its last checkpoint repeats some steps when it resumes: the later row counts.
    by_step = {row["step"]: row for row in rows if row["kind"] == row_kind}
    ordered = [by_step[step] for step in sorted(by_step)]
    values = {key: [row.get(key) for row in ordered] for key in (*kind.required[row_kind], *_OPTIONAL[row_kind])}
    columns = {key: np.array(column, dtype=np.float64) for key, column in values.items()}  # None becomes NaN
    if np.any(np.diff(columns[kind.counter]) < 0):
        reason = f"'{kind.counter}' falls while 'step' rises ({row_kind} rows)"
        raise broken(path, reason, "did two runs write into this folder?")
    return columns


def _read_probe(path: Path) -> Probe:
    content = read_json(path)
    remedy = "measure it again with scripts/probe.py, or delete it"
    try:
        top5, step = content.get("top5"), content.get("step")
        return Probe(
            name=path.stem,
            method=str(content["method"]),
            accuracy=float(content["accuracy"]),
            top5=math.nan if top5 is None else float(top5),
            train=str(content["train"]),
            val=str(content["val"]),
            train_samples=int(content["train_samples"]),
            val_samples=int(content["val_samples"]),
            step=None if step is None else int(step),
            settings=dict(content.get("settings") or {}),
        )
    except KeyError as error:
        raise broken(path, f"has no {error}", remedy) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise broken(path, f"holds a value of a wrong type ({error})", remedy) from None


def _read_reconstructions(index: Path) -> tuple[tuple[Reconstruction, ...], int | None]:
    if not index.exists():
        return (), None
    content = read_json(index)
    remedy = f"delete {index.parent} or leave this run out"
    images = []
    try:
        for entry in content["images"]:
            norm, pixel = (math.nan if entry[key] is None else float(entry[key]) for key in ("loss_norm", "loss_pixel"))
            tiles = (_tile(index, entry[tile], remedy) for tile in _TILES)
            images.append(Reconstruction(str(entry["key"]), norm, pixel, *tiles))
        return tuple(images), int(content["step"])
    except KeyError as error:
        raise broken(index, f"has no {error}", remedy) from None
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise broken(index, f"holds a value of a wrong type ({error})", remedy) from None


def _tile(index: Path, name: str, remedy: str) -> Path:
    if Path(name).name != name:  # an index is data: it must not reach outside its own folder
        raise broken(index, f"{name!r} is not a plain file name", remedy)
    path = index.parent / name
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except FileNotFoundError:
        raise broken(path, "missing, but index.json lists it", remedy) from None
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for a broken PNG
        raise broken(path, "not a readable PNG", remedy) from None
    return path
