"""Reader of run folders: the only module that knows their file names and keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from moa_eval.page.formatting import show
from moa_eval.page.writing import Row
from moa_eval.training.experts import read_experts
from moa_eval.training.files import bad_file, check, fields, list_of, read_json
from moa_eval.training.mixing import read_mixing
from moa_eval.training.runs import AUTOENCODER, LANGUAGE_MODEL, Columns, Reconstruction, Run, RunKind
from moa_train.reading import read_yaml
from moa_train.run_folder import RunFolder

_ROW_COLUMNS = {"train": ("loss", "grad_norm", "epoch", "lr", "throughput", "mfu"), "val": ("loss", "epoch")}
_PROBE = fields(
    ("top5", "step", "settings"),
    method="string",
    accuracy="number",
    top5=["number", "null"],
    train="string",
    val="string",
    train_samples="integer",
    val_samples="integer",
    step=["integer", "null"],
    settings=["object", "null"],
)
_TILES = ("original", "masked", "reconstruction")
_IMAGE = fields(
    key="string", loss_norm=["number", "null"], loss_pixel=["number", "null"], **dict.fromkeys(_TILES, "string")
)


def read_run(folder: str | Path) -> Run:
    """Read and check a run folder.

    Raises:
        DataError: A file is missing or unusable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise bad_file(folder, "no such folder", "give the folder that training wrote (it holds config.yaml)")
    config, kind = _read_config(folder / "config.yaml")
    run = RunFolder(folder)
    rows = run.rows()
    reconstructions, step = _read_reconstructions(folder / "reconstructions/index.json")
    return Run(
        kind=kind,
        folder=folder,
        config=config,
        environment=read_json(folder / "env.json", {"type": "object"}),
        train=_columns(run.metrics, rows, "train", kind),
        validation=_columns(run.metrics, rows, "val", kind),
        summary=run.summary() if (folder / "summary.json").exists() else {},
        reconstructions=reconstructions,
        reconstructions_step=step,
        probes=tuple(_read_probe(path) for path in sorted((folder / "probe").glob("*.json"))),
        mixing=read_mixing(folder / "mixing"),
        experts=read_experts(folder / "experts"),
        evaluations=_read_evaluations(rows, kind),
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
    remedy = "give the config that training resolved"
    config = read_yaml(path, remedy)
    model = config.get("model")
    kind = LANGUAGE_MODEL if isinstance(model, dict) and "ffn" in model else AUTOENCODER
    ffn = fields((), **{kind.ffn_key.split(".")[1]: "string"})
    check(path, config, fields(name="string", seed="integer", optim=fields(lr="number"), model=ffn), remedy)
    return config, kind


def _columns(path: Path, rows: list[dict[str, Any]], row_kind: str, kind: RunKind) -> Columns:
    """Return the columns by step; a resumed run repeats steps after its last checkpoint, and the later row counts."""
    required = ["step", kind.counter, "wall_s"]
    losses = kind.losses if row_kind == "val" else ()
    columns = [*required, *dict.fromkeys((*_ROW_COLUMNS[row_kind], *losses))]
    chosen = [row for row in rows if row["kind"] == row_kind]
    frame: Any = pd.DataFrame(chosen, columns=columns, dtype=np.float64)
    frame = frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    for column in required:
        if frame[column].isna().any():
            raise bad_file(path, f"{column!r} is missing in some row", "delete that line or leave this run out")
    if (frame[kind.counter].diff() < 0).any():
        raise bad_file(path, f"{kind.counter!r} falls while 'step' rises", "did two runs write into this folder?")
    return {column: frame[column].to_numpy() for column in columns}


def _read_evaluations(rows: list[dict[str, Any]], kind: RunKind) -> dict[str, Columns]:
    """Return the values of each evaluator's measure by step; of a repeated step the later row counts."""
    place = ("step", kind.counter, "wall_s")
    chosen = pd.DataFrame([row for row in rows if row["kind"] == "eval"])
    found = {}
    for name in [column for column in chosen.columns if "/" in column]:
        frame = chosen.loc[chosen[name].notna(), [*place, name]].drop_duplicates("step", keep="last")
        frame = frame.sort_values("step").rename(columns={name: "value"}).astype(np.float64)
        found[name] = {column: frame[column].to_numpy() for column in frame.columns}
    return found


def _read_probe(path: Path) -> Row:
    content = read_json(path, _PROBE, "measure it again with scripts/probe.py, or delete it")
    top5, step = content.get("top5"), content.get("step")
    return {
        "probe": path.stem,
        "probe_method": content["method"],
        "top5": math.nan if top5 is None else top5,
        "step": "" if step is None else step,
        "settings": show(content.get("settings") or {}),
        **{key: content[key] for key in ("accuracy", "train", "val", "train_samples", "val_samples")},
    }


def _read_reconstructions(index: Path) -> tuple[tuple[Reconstruction, ...], int | None]:
    if not index.exists():
        return (), None
    remedy = f"delete {index.parent} or leave this run out"
    content = read_json(index, fields(step="integer", images=list_of(_IMAGE)), remedy)
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
