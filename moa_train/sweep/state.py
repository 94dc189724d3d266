"""The runs of a sweep with their states and progress, as their folders record them, and the display of all runs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moa_train.reading import read_json
from moa_train.run_folder import RunFolder

DONE = ("finished", "diverged")
"""States of runs that need no further training."""

STATES = (*DONE, "running", "queued", "waiting", "stopped", "failed")
"""All states of a run."""

SHOW_S = 5.0
"""Update interval of the progress line, seconds."""

LOG_TAIL_LINES = 15
"""Lines of a failed run's log that are printed."""


@dataclass(eq=False)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: Unique name, also that of the folder.
        folder: Run folder.
        log: File for the output of the run.
        arguments: Arguments of the training script.
        state: One of `STATES`.
        step, total_steps: Optimizer steps so far and of the whole run, 0 while unknown.
        loss, val_loss: Newest losses; None if there is none or it is not finite.
    """

    name: str
    folder: Path
    log: Path
    arguments: list[str]
    state: str = "waiting"
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    val_loss: float | None = None

    @property
    def done(self) -> bool:
        """Whether the run needs no further training."""
        return self.state in DONE

    def refresh(self) -> dict[str, Any]:
        """Read steps and losses from the run folder; return the newest training row, {} if there is none."""
        rows = RunFolder(self.folder).rows()
        train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
        if not train:
            return {}
        environment = read_json(self.folder / "env.json", "delete the run folder to start the run again")
        self.step, self.total_steps = train[-1]["step"], environment.get("total_steps", 0)
        self.loss = train[-1].get("loss")
        self.val_loss = val[-1].get("loss_norm", val[-1].get("loss")) if val else None
        return train[-1]

    def settle(self, otherwise: str) -> None:
        """Set the state of a run that has no process: finished, diverged (last loss not finite), or `otherwise`."""
        last = self.refresh()
        diverged = any(key in last and last[key] is None for key in ("loss", "grad_norm"))
        finished = RunFolder(self.folder).status() == "finished"
        self.state = "finished" if finished else "diverged" if diverged else otherwise


def summarize(runs: Sequence[SweepRun]) -> str:
    """Return the number of runs in each state, e.g. "24 run(s): 7 finished, 2 running, 15 waiting"."""
    count = Counter(run.state for run in runs)
    return f"{len(runs)} run(s): " + ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


class ProgressLine(Progress):
    """Progress of all runs on one line of a terminal; elsewhere only starts and ends are printed."""

    def __init__(self, runs: Sequence[SweepRun]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(*columns, disable=not sys.stdout.isatty(), speed_estimate_period=3600)
        self.runs = runs
        self.line = self.add_task(summarize(runs), total=len(runs))
        self.next_s = 0.0

    def say(self, state: str, text: str) -> None:
        """Print a message above the line."""
        self.console.print(f"{state:<11} {text}", markup=False, highlight=False, soft_wrap=True)

    def say_ended(self, run: SweepRun) -> None:
        """Print the state of a run that has ended, with the end of its log if it failed."""
        self.say(run.state, f"{run.name} (log: {run.log})")
        if run.state == "failed" and run.log.exists():
            for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]:
                self.say("", line)

    def show(self) -> None:
        """Update the line, at most every `SHOW_S` seconds."""
        if self.disable or time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + SHOW_S
        for run in self.runs:
            if run.state == "running":
                run.refresh()
        completed = sum(run.done or run.step / max(run.total_steps, 1) for run in self.runs)
        self.update(self.line, description=summarize(self.runs), completed=completed)


def print_table(runs: Sequence[SweepRun]) -> None:
    """Print a table of all runs."""
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "total", "loss", "validation"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        losses = ("" if loss is None else f"{loss:.4g}" for loss in (run.loss, run.val_loss))
        table.add_row(run.name, run.state, f"{run.step:,}", f"{run.total_steps:,}", *losses)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
