"""Reader of run folders: the only module that knows their file names and keys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from moa_eval.training.experts import read_experts
from moa_eval.training.files import NUMBER, bad_file, check, parse_json, read_json, read_text
from moa_eval.training.mixing import read_mixing
from moa_eval.training.runs import AUTOENCODER, FINITE, LANGUAGE_MODEL, Columns, Probe, Reconstruction, Run, RunKind

_OPTIONAL = {"train": ("epoch", "lr", "throughput", "mfu"), "val": ("epoch",)}
_CONFIG = {"name": str, "seed": int, "optim": {"lr": NUMBER}}
_SUMMARY = {"status?": str}
_ENVIRONMENT = {"packages?": dict | None}
_PROBE = {
    "method": str, "accuracy": NUMBER, "top5?": NUMBER | None, "train": str, "val": str, "train_samples": int,
    "val_samples": int, "step?": int | None, "settings?": dict | None,
}  # fmt: skip
_TILES = ("original", "masked", "reconstruction")
_IMAGE = {"key": str, "loss_norm": NUMBER | None, "loss_pixel": NUMBER | None, **dict.fromkeys(_TILES, str)}


def read_run(folder: str | Path) -> Run:
    """Read and check a run folder.

    Raises:
        DataError: A file is missing or unusable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise bad_file(folder, "no such folder", "give the folder that training wrote (it holds config.yaml)")
    config, kind = _read_config(folder / "config.yaml")
    train, validation = _read_metrics(folder / "metrics.jsonl", kind)
    reconstructions, step = _read_reconstructions(folder / "reconstructions/index.json")
    summary = folder / "summary.json"
    return Run(
        kind=kind,
        folder=folder,
        config=config,
        environment=read_json(folder / "env.json", _ENVIRONMENT),
        train=train,
        validation=validation,
        summary=read_json(summary, _SUMMARY) if summary.exists() else {},
        reconstructions=reconstructions,
        reconstructions_step=step,
        probes=tuple(_read_probe(path) for path in sorted((folder / "probe").glob("*.json"))),
        mixing=read_mixing(folder / "mixing"),
        experts=read_experts(folder / "experts"),
    )


def find_runs(folder: str | Path) -> list[Path]:
    """Return the run folder itself, or the run folders directly below a folder, by name.

    Raises:
        DataError: The folder holds no run folder.
    """
    folder = Path(folder)
    if not folder.is_dir() or (folder / "config.yaml").exists():
        return [folder]  # `read_run` reports a missing folder
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise bad_file(folder, "neither a run folder nor a folder of run folders", "is config.yaml missing?")
    return found


def _read_config(path: Path) -> tuple[dict[str, Any], RunKind]:
    text = read_text(path)
    try:
        config = parse_json(json.dumps(yaml.safe_load(text), default=str))  # JSON types only, without aliases
    except Exception as error:  # PyYAML's constructors raise many types for malformed values
        raise bad_file(path, f"not valid YAML ({error})") from error
    remedy = "give the config that training resolved"
    is_language = check(config, {"model": {"ffn": str}}) is None
    kind = LANGUAGE_MODEL if is_language else AUTOENCODER
    if fault := check(config, _CONFIG | {"model": {kind.ffn_key.split(".")[1]: str}}):
        raise bad_file(path, fault, remedy)
    if not math.isfinite(config["optim"]["lr"]):
        raise bad_file(path, "optim.lr is not finite", remedy)
    return config, kind


def _read_metrics(path: Path, kind: RunKind) -> tuple[Columns, Columns]:
    """Return the training and validation rows; a last line without a newline is still being written and left out."""
    schemas = {name: _schema(name, kind) for name in _OPTIONAL}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in schemas}
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise bad_file(path, f"line {number} is not valid JSON ({error})", "delete that line") from error
        fault = check(row, {"kind": str}) or check(row, schemas.get(row["kind"], {}))
        if fault:
            raise bad_file(path, f"line {number}: {fault}", "delete that line or leave this run out")
        rows.get(row["kind"], []).append(row)
    return _columns(path, rows["train"], schemas["train"], kind), _columns(path, rows["val"], schemas["val"], kind)


def _schema(row_kind: str, kind: RunKind) -> dict[str, Any]:
    losses = ("loss", "grad_norm") if row_kind == "train" else dict.fromkeys(("loss", *kind.losses))
    schema = {"step": NUMBER, kind.counter: NUMBER, **dict.fromkeys(losses, NUMBER | None), "wall_s": NUMBER}
    return schema | {f"{key}?": NUMBER | None for key in _OPTIONAL[row_kind]}


def _columns(path: Path, rows: list[dict[str, Any]], schema: dict[str, Any], kind: RunKind) -> Columns:
    """Return the columns by step; a resumed run repeats steps after its last checkpoint, and the later row counts."""
    frame = pd.DataFrame(rows, columns=[key.removesuffix("?") for key in schema], dtype=np.float64)
    frame = frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    columns = {key: frame[key].to_numpy() for key in frame}
    required = [key for key in schema if not key.endswith("?") and key not in FINITE]
    if infinite := [key for key in required if not np.isfinite(columns[key]).all()]:
        raise bad_file(path, f"{infinite[0]!r} is not finite in some row", "delete that line")
    if (np.diff(columns[kind.counter]) < 0).any():
        raise bad_file(path, f"{kind.counter!r} falls while 'step' rises", "did two runs write into this folder?")
    return columns


def _read_probe(path: Path) -> Probe:
    content = read_json(path, _PROBE, "measure it again with scripts/probe.py, or delete it")
    top5 = content.get("top5")
    return Probe(
        name=path.stem,
        **{key: content[key] for key in ("method", "accuracy", "train", "val", "train_samples", "val_samples")},
        top5=math.nan if top5 is None else top5,
        step=content.get("step"),
        settings=content.get("settings") or {},
    )


def _read_reconstructions(index: Path) -> tuple[tuple[Reconstruction, ...], int | None]:
    if not index.exists():
        return (), None
    content = read_json(index, {"step": int, "images": [_IMAGE]}, f"delete {index.parent} or leave this run out")
    images = []
    for entry in content["images"]:
        norm, pixel = (math.nan if entry[key] is None else float(entry[key]) for key in ("loss_norm", "loss_pixel"))
        tiles = {tile: _tile(index, entry[tile]) for tile in _TILES}
        images.append(Reconstruction(entry["key"], norm, pixel, **tiles))
    return tuple(images), content["step"]


def _tile(index: Path, name: str) -> Path:
    remedy = f"delete {index.parent} or leave this run out"
    if Path(name).name != name:  # the index must not reach outside its folder
        raise bad_file(index, f"{name!r} is not a plain file name", remedy)
    path = index.parent / name
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except Exception as error:  # Pillow raises many types for a broken file
        raise bad_file(path, "not a readable PNG", remedy) from error
    return path
