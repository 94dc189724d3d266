"""One training run: what it left behind, and what follows from that."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[np.float64]]

FINITE = ("loss", "loss_norm", "loss_pixel", "grad_norm")  # null or NaN in these means that the run diverged
_ENCODER_NAME = re.compile(r"(.+_patch(\d+))_(\w+)")


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

    def seen_at(self, step: int) -> float:
        """Images or tokens seen at a step, interpolated between recorded rows; the step where there are none."""
        steps = self.train["step"]
        return float(np.interp(step, steps, self.train[self.counter])) if len(steps) else float(step)

    @property
    def flops_per_unit(self) -> float:
        """Floating-point operations of training on one image or token; NaN where the summary lacks them."""
        return self.figure(f"flops_per_{self.counter[:-1]}")

    @property
    def parameters_at_work(self) -> float:
        """Parameters that every token passes, embeddings left out; the total where only that is counted."""
        total, active, inner = (self.figure("parameters", key) for key in ("total", "active", "non_embedding"))
        return total if math.isnan(active) or math.isnan(inner) else active - (total - inner)

    @property
    def training_s(self) -> float:
        """Seconds of training so far, with every step at the run's throughput; NaN if that is unknown.

        So warm-up steps, in which a session compiles and fills caches, count as any other.
        """
        return self.seen / (self.throughput or math.nan)

    @property
    def throughput(self) -> float:
        """Images or tokens per second, each session's warm-up left out; NaN if unknown.

        The mean that the summary has, before there is one the median of the training rows.
        """
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
        """One of "finished", "diverged", "stopped", "failed" or, without a summary, "unfinished"."""
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
