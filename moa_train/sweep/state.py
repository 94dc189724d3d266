"""The runs of a sweep with their states, as their folders record them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moa_train.reading import read_json
from moa_train.run_folder import RunFolder

DONE = ("finished", "diverged")
"""States of runs that need no further training."""

STATES = (*DONE, "running", "queued", "waiting", "stopped", "failed")
"""All states of a run."""


@dataclass(eq=False)
class SweepRun:
    """One run of a sweep: its folder, the file of its output, the script's arguments, and its progress.

    `state` is one of `STATES`; steps are 0 while unknown, and a loss is None if there is none or it is not finite.
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

    def settle(self, otherwise: str) -> None:
        """Read the run folder; set the state to finished, diverged (last loss not finite), or `otherwise`."""
        self.state = otherwise
        folder = RunFolder(self.folder)
        train, val = ([row for row in folder.rows() if row["kind"] == kind] for kind in ("train", "val"))
        if not train:
            return
        environment = read_json(self.folder / "env.json", "delete the run folder to start the run again")
        self.step, self.total_steps = train[-1]["step"], environment.get("total_steps", 0)
        self.loss = train[-1].get("loss")
        self.val_loss = val[-1].get("loss_norm", val[-1].get("loss")) if val else None
        if folder.status() == "finished":
            self.state = "finished"
        elif any(key in train[-1] and train[-1][key] is None for key in ("loss", "grad_norm")):
            self.state = "diverged"


def summarize(runs: Sequence[SweepRun]) -> str:
    """Return the number of runs in each state, e.g. "24 run(s): 7 finished, 2 running, 15 waiting"."""
    count = Counter(run.state for run in runs)
    return f"{len(runs)} run(s): " + ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def print_table(runs: Sequence[SweepRun]) -> None:
    """Print a table of all runs."""
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "total", "loss", "validation"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        losses = ("" if loss is None else f"{loss:.4g}" for loss in (run.loss, run.val_loss))
        table.add_row(run.name, run.state, f"{run.step:,}", f"{run.total_steps:,}", *losses)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
