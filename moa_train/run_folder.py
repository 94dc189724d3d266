"""The run folder: config, environment, metrics rows, events and summary. Light: it imports no torch."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moa_train.atomic_io import write_json, write_text
from moa_train.errors import ConfigError, DataError
from moa_train.reading import differing_keys, read_json, read_yaml

Row = dict[str, Any]

KINDS = ("train", "val", "eval")
"""Kinds of metrics rows."""


class RunInUse(ConfigError):
    """A run folder that another process has locked."""


class RunFolder:
    """The files of one run.

    config.yaml     resolved config                        env.json        versions, device, git commit, command
    metrics.jsonl   one JSON object per row, in order      summary.json    final and best losses, times, status
    events.jsonl    sessions, skipped steps                checkpoints/    see checkpoint.py
    trackers/       files of trackers and the run's id for them
    reconstructions/, mixing/, export/ ...   diagnostics and export of the task
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.trackers = path / "trackers"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self._summary = path / "summary.json"

    def check(self, tree: dict[str, Any], resume: str, mutable_keys: frozenset[str]) -> list[str]:
        """Return the keys in which an existing run differs from the config `tree` if resuming it is allowed.

        Raises:
            ConfigError: The folder holds a run, and `resume` is "never", or keys outside `mutable_keys` differ and
                `resume` is not "force".
            DataError: The run's config.yaml or metrics.jsonl cannot be read.
        """
        if not self.rows() and not any(self.checkpoints.glob("step_*")):
            return []
        if resume == "never":
            raise ConfigError(f"{self.path} already holds a run and resume is 'never'; choose another name")
        try:
            old = read_yaml(self.path / "config.yaml", "restore it, or continue with --resume force")
        except DataError:
            if resume != "force":
                raise
            return ["all keys: config.yaml cannot be read"]
        different = differing_keys(old, tree, mutable_keys=mutable_keys)
        if different and resume != "force":
            raise ConfigError(
                f"{self.path} holds a run with another config ({'; '.join(different)}); choose another name, restore "
                "these values, or continue with --resume force"
            )
        return different

    def open(self, tree: dict[str, Any], environment: dict[str, Any]) -> None:
        """Create the folder if necessary and write config.yaml and env.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(tree, sort_keys=False))
        write_json(self.path / "env.json", environment)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other processes. Raises RunInUse if another process has locked it.

        A POSIX record lock ends with its process, and data workers do not inherit it.
        """
        with (self.path / "run.lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise RunInUse(
                    f"{self.path} is in use by another process ({file.read().strip()}); wait until it has ended, stop "
                    "it, or choose another name"
                ) from error
            except OSError as error:
                print(f"warning: {file.name} cannot be locked ({error}); start this run only once", file=sys.stderr)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def rows(self) -> list[Row]:
        """Return the rows of metrics.jsonl without a last line that a crash cut short.

        Raises DataError naming the line that is no metrics row.
        """
        if not self.metrics.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                rows.append(parse_row(line))
            except DataError as error:
                raise DataError(f"{self.metrics} line {number} is no metrics row ({error}); delete it") from error
        return rows

    def truncate(self, step: int, validated: int) -> None:
        """Drop the rows after `step`, validation rows after `validated`, and lines cut short."""
        last = {"train": step, "val": validated, "eval": step}
        kept = [row for row in self.rows() if row["step"] <= last[row["kind"]]]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        if self.events.exists():
            events = self.events.read_text(encoding="utf-8", errors="replace")
            write_text(self.events, events[: events.rfind("\n") + 1])

    def append(self, row: Row) -> None:
        """Append a row to metrics.jsonl; NaN becomes null. Raises OSError if the disk is full."""
        _append(self.metrics, row)

    def append_event(self, row: Row) -> None:
        """Append a row to events.jsonl; NaN becomes null. Raises OSError if the disk is full.

        Events are never dropped: steps that are repeated after a crash have theirs twice.
        """
        _append(self.events, row)

    def summarize(self, fields: dict[str, Any], best_by: str) -> None:
        """Write summary.json: `fields` and the losses of the rows; the best has the lowest `best_by`."""
        write_json(self._summary, {**fields, **summarize_rows(self.rows(), best_by)})

    def summary(self) -> dict[str, Any]:
        """Return summary.json. Raises DataError if it is missing or damaged."""
        remedy = "delete it, and the run's command writes it again"
        summary = read_json(self._summary, remedy)
        if not isinstance(summary.get("status"), str):
            raise DataError(f"{self._summary} has no status; {remedy}")
        return summary

    def finished_steps(self) -> int | None:
        """Return the number of steps of a finished run, else None."""
        return self.summary().get("steps") if self.status() == "finished" else None

    def status(self) -> str:
        """Return the summary's status, "unfinished" without a readable summary."""
        try:
            return self.summary()["status"]
        except DataError:
            return "unfinished"


def _append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_with_null(row)) + "\n")


def parse_row(line: str | bytes) -> Row:
    """Return a line of metrics.jsonl as a row: "kind", "step", and numbers or None; NaN and infinity become None.

    Raises DataError for anything else.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON: {error}") from error
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        raise DataError(f"it is no object of kind {', '.join(KINDS)}")
    if type(row.get("step")) is not int or row["step"] < 0:
        raise DataError(f"step is {row.get('step')!r}")
    for key, value in row.items():
        if key != "kind" and not (value is None or type(value) in (int, float)):
            raise DataError(f"{key} is {value!r}, not a number or null")
    return _with_null(row)


def _with_null(row: Row) -> Row:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def summarize_rows(rows: Iterable[Row], best_by: str) -> dict[str, Any]:
    """Return final and best validation losses, and the last training loss."""
    rows = list(rows)
    val = [row for row in rows if row["kind"] == "val"]
    train = [row for row in rows if row["kind"] == "train"]
    best = min((row for row in val if row.get(best_by) is not None), key=lambda row: row[best_by], default=None)
    return {
        "final": _losses(val[-1]) if val else None,
        "best": {**_losses(best), "step": best["step"]} if best else None,
        "train_loss": train[-1].get("loss") if train else None,
    }


def _losses(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("kind", "step", "epoch", "samples", "tokens", "wall_s")}
