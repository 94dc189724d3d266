"""A run folder, read and checked. The only place that knows the folder's file names and keys."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

Columns = dict[str, NDArray[np.float64]]

FINITE = ("loss", "loss_norm", "loss_pixel", "grad_norm")  # null or NaN in these means that the run diverged
_OPTIONAL = {"train": ("epoch", "lr", "throughput", "mfu"), "val": ("epoch",)}  # columns that a row may lack
_CONFIG_KEYS = {"name": str, "seed": int, "optim.lr": int | float}  # what a page cannot do without
TILES = ("original", "masked", "reconstruction")

_ENCODER_NAME = re.compile(r"(.+_patch(\d+))_(\w+)")
_REMEDY = "restore the file or leave this run out"


class RunFolderError(ValueError):
    """A run folder is missing, incomplete or broken; the message is one line that names the file and the remedy."""


@dataclass(frozen=True)
class Kind:
    """What a run trains, and what its rows are called.

    Attributes:
        name: In words.
        counter: The column that counts what was seen, "samples" or "tokens"; unit: one of these in words.
        losses: Columns of a validation row that are compared, with the space each is taken in, in words.
        objective: What these losses are, in words.
        ffn_key: The key of the configuration that names the FFN.
    """

    name: str
    counter: str
    unit: str
    losses: dict[str, str]
    objective: str
    ffn_key: str

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        """The columns that every row must have, by kind of row."""
        return {
            "train": ("step", self.counter, "loss", "grad_norm", "wall_s"),
            "val": ("step", self.counter, *dict.fromkeys(("loss", *self.losses)), "wall_s"),
        }


AUTOENCODER = Kind(
    name="masked autoencoder",
    counter="samples",
    unit="image",
    losses={"loss_norm": "normalized space", "loss_pixel": "pixel space"},
    objective="reconstruction loss",
    ffn_key="model.encoder",
)
LANGUAGE_MODEL = Kind(
    name="language model",
    counter="tokens",
    unit="token",
    losses={"loss": "cross-entropy"},
    objective="loss",
    ffn_key="model.ffn",
)


class EncoderName(NamedTuple):
    """The parts of a timm name such as "vit_base_patch16_qdmoa": "vit_base_patch16", 16 and "qdmoa"."""

    size: str
    patch: int | None
    ffn: str


@dataclass(frozen=True)
class Reconstruction:
    """One held-out image: its key, its losses on the masked patches, and its three PNG files."""

    key: str
    loss_norm: float
    loss_pixel: float
    original: Path
    masked: Path
    reconstruction: Path


@dataclass(frozen=True)
class Probe:
    """What a frozen or fine-tuned encoder is worth in classification, as `scripts/probe.py` measured it.

    Attributes:
        name: The file's name without its ending: the method, or the method and what it was measured on.
        method: "knn", "linear" or "finetune".
        accuracy, top5: Fractions of the held-out images; top5 is NaN where it was not measured.
        train, val: Patterns of the shards; train_samples, val_samples: how many images they hold.
        step: Training step of the encoder, None if it is not known.
        settings: How it was measured.
    """

    name: str
    method: str
    accuracy: float
    top5: float
    train: str
    val: str
    train_samples: int
    val_samples: int
    step: int | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one training run left behind.

    Attributes:
        kind: What it trains.
        folder: The run folder.
        config: The resolved configuration, as nested dictionaries.
        environment: Versions, device, git commit and command.
        train: One array per column of the training rows, ordered by step; NaN where a row has no value.
        validation: The same for the validation rows.
        summary: The summary, empty while the run has not written one.
        reconstructions: Held-out images in the order in which they were written; empty if there are none.
        reconstructions_step: The step they belong to, None if there are none.
        probes: What its encoder is worth, ordered by name.
    """

    kind: Kind
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: Columns
    validation: Columns
    summary: dict[str, Any]
    reconstructions: tuple[Reconstruction, ...]
    reconstructions_step: int | None
    probes: tuple[Probe, ...]

    @property
    def losses(self) -> dict[str, str]:
        """Columns of a validation row that are compared, with the space each is taken in, in words."""
        return self.kind.losses

    @property
    def counter(self) -> str:
        """The column that counts what was seen: "samples" or "tokens"."""
        return self.kind.counter

    @property
    def unit(self) -> str:
        """What is counted, in words: "image" or "token"."""
        return self.kind.unit

    @property
    def name(self) -> str:
        """The configured name."""
        return str(self.config["name"])

    @property
    def seed(self) -> int:
        """The configured seed."""
        return self.config["seed"]

    @property
    def ffn(self) -> str:
        """The FFN variant, such as "qdmoa": of an encoder, what its name ends in."""
        return split_encoder(self.config["model"][self.kind.ffn_key.split(".")[-1]]).ffn

    @property
    def peak_lr(self) -> float:
        """The peak learning rate (absolute)."""
        return float(self.config["optim"]["lr"])

    @property
    def device(self) -> str:
        """The accelerator's name, or the processor's where there was none."""
        device = self.environment.get("device")
        return str(self.environment.get("cpu", device) if device == "cpu" else device)

    @property
    def seen(self) -> int:
        """Images or tokens seen at the last recorded row of either kind; 0 before the first."""
        return int(
            max((rows[self.counter][-1] for rows in (self.train, self.validation) if len(rows["step"])), default=0)
        )

    @property
    def flops_per_unit(self) -> float:
        """Floating-point operations of training on one image or token; NaN where the summary lacks them."""
        return self.figure(f"flops_per_{self.counter[:-1]}")

    @property
    def wall_s(self) -> float:
        """Training seconds at the last recorded row of either kind; 0 before the first."""
        return float(
            max((rows["wall_s"][-1] for rows in (self.train, self.validation) if len(rows["step"])), default=0)
        )

    @property
    def throughput(self) -> float:
        """Median images or tokens per second: the summary's, before that the training rows'; NaN if unknown."""
        if (recorded := self.figure("throughput")) == recorded:
            return recorded
        known = self.train["throughput"][np.isfinite(self.train["throughput"])]
        return float(np.median(known)) if len(known) else math.nan

    @cached_property
    def diverged_at(self) -> int | None:
        """The first step with a loss or gradient that is not finite, None if there is no such step."""
        steps = [
            rows["step"][~np.isfinite(rows[key])]
            for rows in (self.train, self.validation)
            for key in FINITE
            if key in rows
        ]
        bad = np.concatenate(steps)
        return int(bad.min()) if len(bad) else None

    @property
    def status(self) -> str:
        """One of "finished", "diverged", "stopped" or, without a summary, "unfinished"."""
        if self.diverged_at is not None:
            return "diverged"
        return str(self.summary.get("status", "unfinished"))

    def figure(self, *path: str) -> float:
        """A number of the summary by its path of keys, such as ("parameters", "total"); NaN where it is not known."""
        value: Any = self.summary
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, int | float) else math.nan


def split_encoder(name: str) -> EncoderName:
    """Take "vit_base_patch16_qdmoa" apart; a name of another form is all size and all FFN, with no patch size."""
    match = _ENCODER_NAME.fullmatch(name)
    return EncoderName(match[1], int(match[2]), match[3]) if match else EncoderName(name, None, name)


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
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise broken(path, f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise broken(path, f"holds a {type(content).__name__}, not an object")
    return content


def _read_config(path: Path) -> tuple[dict[str, Any], Kind]:
    try:
        config = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise broken(path, f"not valid YAML ({error})") from None
    kind = LANGUAGE_MODEL if isinstance(_look_up(config, LANGUAGE_MODEL.ffn_key), str) else AUTOENCODER
    for key, wanted in (_CONFIG_KEYS | {kind.ffn_key: str}).items():
        value = _look_up(config, key)
        if not isinstance(value, wanted) or isinstance(value, bool):
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
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline yet: a run that is being written, or was killed while writing
                break
            raise broken(path, f"line {number} is not valid JSON ({error})", "delete that line") from None
        if reason := _row_fault(row, kind):
            raise broken(path, f"line {number} {reason}", "delete that line or leave this run out")
        rows.append(row)
    return rows


def _row_fault(row: Any, kind: Kind) -> str | None:
    if not isinstance(row, dict) or "kind" not in row:
        return "has no 'kind'"
    required = kind.required.get(row["kind"], ())
    for key in (*required, *_OPTIONAL.get(row["kind"], ())):
        value = row.get(key)
        if value is None and (key not in required or (key in row and key in FINITE)):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"({row['kind']}) has no number '{key}' (found {value!r})"
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
    except (TypeError, ValueError) as error:
        raise broken(path, f"holds a value of a wrong type ({error})", remedy) from None


def _read_reconstructions(index: Path) -> tuple[tuple[Reconstruction, ...], int | None]:
    if not index.exists():
        return (), None
    content = read_json(index)
    remedy = f"delete {index.parent} or leave this run out"
    images = []
    try:
        for entry in content["images"]:
            norm, pixel = (
                math.nan if entry[key] is None else float(entry[key]) for key in ("loss_norm", "loss_pixel")
            )
            tiles = (_tile(index, entry[tile], remedy) for tile in TILES)
            images.append(Reconstruction(str(entry["key"]), norm, pixel, *tiles))
        return tuple(images), int(content["step"])
    except KeyError as error:
        raise broken(index, f"has no {error}", remedy) from None
    except TypeError as error:
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
    except (OSError, SyntaxError):  # what Pillow raises for a broken PNG
        raise broken(path, "not a readable PNG", remedy) from None
    return path
