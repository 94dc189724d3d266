"""What a person sees of a sweep: a live table on a terminal; elsewhere a line at every change and now and then."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moa_train.progress import duration
from moa_train.sweep.state import Job, time_left_s

LINES_EVERY_S = 60.0
"""Without a terminal: seconds between lines on what is running."""

TABLE_EVERY_S = 2.0
"""On a terminal: seconds between refreshes."""

STYLES = {
    "running": "bold cyan",
    "elsewhere": "cyan",
    "queued": "cyan",
    "finished": "green",
    "diverged": "yellow",
    "stopped": "yellow",
    "failed": "bold red",
    "waiting": "dim",
}
"""All states and how they look. Where not all runs fit, earlier states of URGENCY are shown first."""

URGENCY = ("running", "elsewhere", "failed", "stopped", "queued", "waiting", "diverged", "finished")


class Board:
    """Lines in a log: one at every change, and one for each running run now and then; a context manager.

    `due()` says when `show` wants to be called; runs should be looked at before it is.
    """

    every_s = LINES_EVERY_S

    def __init__(self) -> None:
        self._next_s = time.monotonic()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None:
        """Print a message."""
        print(text, flush=True)

    def started(self, job: Job) -> None:
        """Tell that a run starts."""
        self.say(f"started     {job.run.name} (log: {job.run.log})")

    def ended(self, job: Job, tail: str) -> None:
        """Tell what has become of a run; `tail` is the end of its log if it failed."""
        self.say(f"{job.state:<11} {one_line(job)}")
        if tail:
            indented = "\n".join(f"    {line}" for line in tail.splitlines())
            self.say(f"    the end of {job.run.log}:\n{indented}")

    def due(self) -> bool:
        """Tell whether it is time to show all runs anew."""
        if time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + self.every_s
        return True

    def show(self, jobs: Sequence[Job], at_once: int) -> None:
        """Show the running runs and how far all are."""
        for job in jobs:
            if job.state in ("running", "elsewhere"):
                self.say(f"{job.state:<11} {one_line(job)}")
        self.say(f"all         {overall(jobs, at_once)}")


class LiveBoard(Board):
    """A table on a terminal, redrawn in place; messages go above it."""

    every_s = TABLE_EVERY_S

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Board:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a message above the table."""
        self.console.print(Text(text), soft_wrap=True)

    def started(self, job: Job) -> None:
        """Say nothing: the table shows it."""

    def ended(self, job: Job, tail: str) -> None:
        """Tell of a run that failed; the table shows the rest."""
        if job.state == "failed":
            super().ended(job, tail)

    def show(self, jobs: Sequence[Job], at_once: int) -> None:
        """Draw the table."""
        room = max(3, self.console.height - 6)
        self._live.update(Group(table(jobs, room), Text(overall(jobs, at_once))), refresh=True)


def make_board() -> Board:
    """Return the board that suits where the output goes."""
    return LiveBoard() if sys.stdout.isatty() else Board()


def one_line(job: Job) -> str:
    """Return a run's name and how far it is."""
    name, _, *cells = cells_of(job)
    words = ("step", "loss", "val", "speed", "left")
    return ", ".join([name, *(f"{word} {cell}" for word, cell in zip(words, cells, strict=True) if cell)])


def cells_of(job: Job) -> list[str]:
    """Return a run's row: name, state, step/total, loss, validation loss, speed, time left."""
    p, active = job.progress, job.state in ("running", "elsewhere")
    left = p.left_s if active else None
    return [
        job.run.name,
        f"{job.state} before" if job.skipped else job.state,
        f"{p.step:,}" + (f"/{p.total:,}" if p.total else "") if p.step else "",
        _loss(p.loss),
        _loss(p.val_loss),
        f"{p.throughput:.4g} {p.counter}/s" if p.throughput else "",
        "" if left is None else duration(left),
    ]


def _loss(value: float | None) -> str:
    """Return a loss with four digits after the point, one that has gone astray in short."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def table(jobs: Sequence[Job], room: int) -> Table:
    """Return a table of at most `room` runs, in the sweep's order: all, or those that matter most now."""
    chosen = sorted(range(len(jobs)), key=lambda i: URGENCY.index(jobs[i].state))[:room]
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    drawn.add_column("run", overflow="ellipsis", no_wrap=True)
    drawn.add_column("state", no_wrap=True)
    for title in ("step", "loss", "validation", "speed", "left"):
        drawn.add_column(title, justify="right", no_wrap=True)
    for i in sorted(chosen):
        cells: list[str | Text] = list(cells_of(jobs[i]))
        cells[1] = Text(str(cells[1]), style=STYLES[jobs[i].state])
        drawn.add_row(*cells)
    if len(chosen) < len(jobs):
        drawn.add_row(Text(f"and {len(jobs) - len(chosen)} more", style="dim"))
    return drawn


def overall(jobs: Sequence[Job], at_once: int) -> str:
    """Return e.g. "7 of 24 done (1 diverged), 2 running; about 1 h 20 min of training left"."""
    count = Counter(job.state for job in jobs)
    done = sum(job.done for job in jobs)
    parts = [f"{done} of {len(jobs)} done" + (f" ({count['diverged']} diverged)" if count["diverged"] else "")]
    parts += [f"{count[state]} {state}" for state in STYLES if count[state] and state not in ("finished", "diverged")]
    left = time_left_s(jobs, at_once)
    ending = f"; about {duration(left)} of training left" if left and done < len(jobs) else ""
    return ", ".join(parts) + ending
