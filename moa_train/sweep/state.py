"""How each run is doing, as its folder tells, and how long all will take."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_train.reading import read_json
from moa_train.run_folder import RunFolder, parse_row
from moa_train.sweep.grid import PlannedRun

TAIL_BYTES = 1 << 16
"""What is read of a metrics file to see how far the run is: its last rows."""

DONE = ("finished", "diverged")
"""States in which a run has said what it had to say."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: "none" (nothing written yet), "begun", "finished" or "diverged" (its last loss or gradient not finite).
        step, total: Finished optimizer steps, and all; 0 while unknown.
        loss, val_loss: The newest training and validation loss.
        throughput: Samples or tokens a second, newest; None while a session warms up.
        wall_s: Seconds of training so far.
        counter: What the throughput counts, "samples" or "tokens".
        seen: How many of them so far.
    """

    state: str = "none"
    step: int = 0
    total: int = 0
    loss: float | None = None
    val_loss: float | None = None
    throughput: float | None = None
    wall_s: float = 0.0
    counter: str = "samples"
    seen: int = 0

    @property
    def duration_s(self) -> float | None:
        """Seconds of training that the whole run takes, at the newest throughput; None while unknown."""
        if self.step == self.total > 0:
            return self.wall_s
        if not (self.step and self.total and self.seen and self.throughput):
            return None
        return self.wall_s + max(0, self.total - self.step) * self.seen / self.step / self.throughput

    @property
    def left_s(self) -> float | None:
        """Seconds of training to go, None while unknown."""
        if self.state in DONE:
            return 0.0
        return None if self.duration_s is None else self.duration_s - self.wall_s


GOING = ("waiting", "queued", "running", "elsewhere")
"""States in which a run is still to be done by this sweep."""


@dataclass
class Job:
    """A run of a sweep and what has become of it.

    Attributes:
        run: The run.
        state: "waiting", "queued" (on the cluster), "running", "elsewhere" (another process is at it), "finished",
            "diverged", "stopped" or "failed".
        progress: How far it is, as last seen.
        skipped: It was done before this session.
    """

    run: PlannedRun
    state: str = "waiting"
    progress: Progress = field(default_factory=Progress)
    skipped: bool = False

    @property
    def done(self) -> bool:
        """Whether the run has said what it had to say."""
        return self.state in DONE

    def look(self) -> None:
        """Bring `progress` up to date."""
        self.progress = observe(self.run.folder)


def time_left_s(jobs: Sequence[Job], at_once: int) -> float | None:
    """Return the seconds until no run is left to do, `at_once` at a time; None while no run's duration is known.

    A run that has not begun is taken to last as long as the others do on average. Training alone is counted, and
    runs that have failed or stopped are not.
    """
    known = [job.progress.duration_s for job in jobs if job.progress.duration_s is not None]
    if not known:
        return None
    usual = statistics.fmean(known)
    left = [usual if job.progress.left_s is None else job.progress.left_s for job in jobs if job.state in GOING]
    return max([sum(left) / at_once, *left], default=0.0)


def observe(folder: Path) -> Progress:
    """Return how far the run in `folder` is; a folder that is missing or holds no rows has not begun."""
    rows = last_rows(folder / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    if not train:
        return Progress()
    last = train[-1]
    return Progress(
        state=_state(folder, last),
        step=last["step"],
        total=total_steps(folder),
        loss=last.get("loss"),
        val_loss=val[-1].get("loss_norm", val[-1].get("loss")) if val else None,
        throughput=last.get("throughput"),
        counter="tokens" if "tokens" in last else "samples",
        wall_s=last.get("wall_s") or 0.0,
        seen=last.get("tokens") or last.get("samples") or 0,
    )


def _state(folder: Path, last: dict[str, Any]) -> str:
    if last.get("loss", 0.0) is None or last.get("grad_norm", 0.0) is None:  # NaN and infinity are written as null
        return "diverged"
    return "finished" if RunFolder(folder).status() == "finished" else "begun"


def total_steps(folder: Path) -> int:
    """Return the steps of the whole run, as its env.json says; 0 if unknown."""
    try:
        total = read_json(folder / "env.json", "").get("total_steps")
    except ValueError:
        return 0
    return total if isinstance(total, int) and 0 < total < 2**63 else 0


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows in the end of a metrics file, none if there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # a last line without an end is still being written
    except OSError:
        return []
    rows = []
    for line in lines[1:] if size > TAIL_BYTES else lines:
        try:
            rows.append(parse_row(line))
        except ValueError:
            continue  # the run itself will refuse it and say which line
    return rows
