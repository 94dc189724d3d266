"""Progress display: a live line on a terminal, occasional lines in a log, and the throughput behind them."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

LAYOUT = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"

LINE_EVERY_S = 30.0
"""Interval of progress lines without a terminal."""

WARMUP_STEPS = 5
"""First steps of a session, which are not timed: they compile, fill caches and start data workers."""

MIN_STEPS, MIN_SECONDS = 5, 2.0
"""Timed steps and their total duration before throughput and remaining time are reported."""

WINDOW_STEPS = 50
"""Most recent steps that the throughput is averaged over."""


class StepTimer:
    """Mean duration of recent steps."""

    def __init__(self) -> None:
        self._warmup_left = WARMUP_STEPS
        self._recent_s: deque[float] = deque(maxlen=WINDOW_STEPS)

    def add(self, seconds: float) -> bool:
        """Record the duration of a step; return whether it counts (warm-up steps do not)."""
        if self._warmup_left:
            self._warmup_left -= 1
            return False
        self._recent_s.append(seconds)
        return True

    def step_s(self) -> float | None:
        """Return the mean seconds per step, None until enough steps have been timed."""
        total = sum(self._recent_s)
        if len(self._recent_s) < MIN_STEPS or (total < MIN_SECONDS and len(self._recent_s) < WINDOW_STEPS):
            return None
        return total / len(self._recent_s)


class Progress:
    """Progress of a run: a live line on a terminal, a line every `LINE_EVERY_S` elsewhere. Silent unless `visible`."""

    def __init__(self, *, visible: bool, step: int, total_steps: int) -> None:
        self.visible = visible
        self.total_steps = total_steps
        self._begin = step
        self._next_line_s = 0.0
        self._bar: tqdm[Any] | None = None

    def update(self, step: int, epoch: float, loss: float, lr: float, rate: str) -> None:
        """Show the progress; `rate` is throughput and remaining time as text."""
        if not self.visible:
            return
        text = f"loss {loss:.4f}, lr {lr:.2e}, {rate}"
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=self.total_steps, initial=self._begin, dynamic_ncols=True, bar_format=LAYOUT)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() >= self._next_line_s or step == self.total_steps:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self.print(f"step {step}/{self.total_steps}, epoch {epoch:.2f}: {text}")

    def print(self, text: str) -> None:
        """Print a message above the live line."""
        if self.visible:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """End the live line."""
        if self._bar is not None:
            self._bar.close()


class CountBar(tqdm):
    """tqdm with a live bar on a terminal and a line every `LINE_EVERY_S`, with rate and remaining time, elsewhere."""

    def __init__(self, *, total: int, title: str, unit: str) -> None:
        self._live = sys.stderr.isatty()
        form = None if self._live else "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left"
        every_s = 0.1 if self._live else LINE_EVERY_S
        # delay: a quick loop prints nothing
        super().__init__(
            total=total, desc=title, unit=unit, leave=False, bar_format=form, mininterval=every_s, delay=every_s
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar or print the line; called by tqdm."""
        if self._live:
            super().display(msg, pos)
        elif msg is None:  # tqdm clears a bar with ""
            print(self, flush=True)


def duration(seconds: float) -> str:
    """Return e.g. "48 s", "5 min 20 s", "3 h 05 min", "2 d 04 h"."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{h} h {m:02d} min"
    return f"{m} min {s:02d} s" if minutes else f"{s} s"


def count(number: float) -> str:
    """Return a number with three digits and a metric unit, e.g. "86.6 M", "58.7 G"."""
    for factor, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:g}"
