"""A training run: the content of its run folder and the quantities derived from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moa_eval.page.writing import Row
from moa_eval.training.configuration import flatten, split_encoder
from moa_eval.training.mixing import Mixing

Columns = dict[str, NDArray[np.float64]]

FINITE = ("loss", "loss_norm", "loss_pixel", "grad_norm")
"""Columns in which a missing or non-finite value means that the run diverged."""


@dataclass(frozen=True)
class RunKind:
    """What a run trains: its terms on the page and in messages, its columns, and the config key of its FFN.

    `counter` is the column that counts training data; `losses` are the compared columns of validation rows, with the
    name of the space that each loss is measured in.
    """

    name: str
    counter: str
    unit: str
    losses: dict[str, str]
    objective: str
    ffn_key: str


AUTOENCODER = RunKind(
    name="masked autoencoder",
    counter="samples",
    unit="image",
    losses={"loss_norm": "normalized space", "loss_pixel": "pixel space"},
    objective="reconstruction loss",
    ffn_key="model.encoder",
)
LANGUAGE_MODEL = RunKind(
    name="language model",
    counter="tokens",
    unit="token",
    losses={"loss": "cross-entropy"},
    objective="loss",
    ffn_key="model.ffn",
)


@dataclass(frozen=True)
class Reconstruction:
    """A held-out image: its key, its losses on the masked patches, and its three PNG files."""

    key: str
    loss_norm: float
    loss_pixel: float
    original: Path
    masked: Path
    reconstruction: Path


@dataclass(frozen=True, eq=False)
class Run:
    """A training run: the content of its folder.

    Attributes:
        config: The resolved config.
        environment: Versions, device, git commit and command.
        train, validation: Rows by rising step: an array per column, NaN where a row has no value.
        summary: The summary, empty until the run has written one.
        probes: A row per measurement of the encoder (`scripts/probe.py`); accuracies are fractions of held-out images.
        experts: A row per recorded step and layer.
        evaluations: What evaluators measured during training, by name such as "knn/accuracy": columns as in
            `validation`, with the values in "value".
        label, index: Name and position on the page, set by `compare`.
    """

    kind: RunKind
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: Columns
    validation: Columns
    summary: dict[str, Any]
    reconstructions: tuple[Reconstruction, ...] = ()
    reconstructions_step: int | None = None
    probes: Sequence[Row] = ()
    mixing: Mixing | None = None
    experts: Sequence[Row] = ()
    evaluations: dict[str, Columns] = field(default_factory=dict)
    label: str = ""
    index: int = 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config with dotted keys."""
        return flatten(self.config)

    @property
    def name(self) -> str:
        """The configured name."""
        return self.config["name"]

    @property
    def seed(self) -> int:
        """The configured seed."""
        return self.config["seed"]

    @property
    def ffn(self) -> str:
        """The FFN variant, such as "qdmoa"; for an encoder, the end of its name."""
        return split_encoder(self.settings[self.kind.ffn_key]).ffn

    @property
    def peak_lr(self) -> float:
        """The peak learning rate."""
        return float(self.config["optim"]["lr"])

    @property
    def device(self) -> str:
        """Name of the accelerator, or of the processor for a run on the CPU."""
        device = self.environment.get("device")
        return str(self.environment.get("cpu", device) if device == "cpu" else device)

    @property
    def seen(self) -> int:
        """Images or tokens at the last row; 0 before the first row."""
        return int(max(rows[self.kind.counter].max(initial=0) for rows in (self.train, self.validation)))

    @property
    def end(self) -> float:
        """Images or tokens at the last validation; 0 before the first."""
        return float(self.validation[self.kind.counter][-1]) if self.is_validated else 0.0

    @property
    def is_validated(self) -> bool:
        """Whether the run has a validation."""
        return len(self.validation["step"]) > 0

    @property
    def is_usable(self) -> bool:
        """Whether the run has a validation and all its losses are finite."""
        return self.diverged_at is None and self.is_validated

    def final(self, loss: str) -> float:
        """Return the loss of the last validation, NaN without one."""
        return float(self.validation[loss][-1]) if self.is_validated else math.nan

    def best(self, loss: str) -> float:
        """Return the lowest validation loss, NaN without one."""
        return float(np.nanmin(self.validation[loss])) if np.isfinite(self.validation[loss]).any() else math.nan

    def loss_at(self, loss: str, seen: float) -> float:
        """Return the loss of the last validation after `seen` images or tokens."""
        return float(self.validation[loss][self.validation[self.kind.counter] == seen][-1])

    @property
    def flops_per_unit(self) -> float:
        """Training FLOPs per image or token; NaN if unknown."""
        return self.number(f"flops_per_{self.kind.counter[:-1]}")

    @property
    def throughput(self) -> float:
        """Images or tokens per second without warm-up: the summary's mean, else the median over rows, else NaN."""
        recorded, rows = self.number("throughput"), self.train["throughput"]
        known = rows[np.isfinite(rows)]
        return float(np.median(known)) if math.isnan(recorded) and len(known) else recorded

    @property
    def training_s(self) -> float:
        """Seconds of training at the run's throughput; NaN if unknown."""
        return self.seen / (self.throughput or math.nan)

    @cached_property
    def diverged_at(self) -> int | None:
        """The first step with a non-finite loss or gradient, None if all are finite."""
        frames = (self.train, self.validation)
        steps = [rows["step"][~np.isfinite(rows[key])] for rows in frames for key in FINITE if key in rows]
        bad = np.concatenate(steps)
        return int(bad.min()) if len(bad) else None

    @property
    def status(self) -> str:
        """One of "finished", "diverged", "stopped", "failed" and "unfinished"."""
        return "diverged" if self.diverged_at is not None else self.summary.get("status", "unfinished")

    def number(self, *path: str) -> float:
        """Return a number of the summary by its keys, such as "parameters", "total"; NaN if it is absent."""
        value: Any = self.summary
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, int | float) else math.nan
