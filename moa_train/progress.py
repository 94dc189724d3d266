"""What a person sees of a run: one live line and messages, on the main process only."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

LAYOUT = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"

LINE_EVERY_S = 30.0
"""Without a terminal: at most one progress line in this many seconds."""


WARMUP_STEPS = 5
"""Steps of a session that are never timed: they compile, fill caches and start the loader's workers."""

MIN_STEPS, MIN_SECONDS = 5, 2.0
"""Timed steps, and their total duration, before a rate and a time left are reported."""

WINDOW_STEPS = 50
"""Most recent steps whose mean duration gives the rate."""


class StepTimer:
    """Mean duration of recent steps."""

    def __init__(self) -> None:
        self._warmup_left = WARMUP_STEPS
        self._recent_s: deque[float] = deque(maxlen=WINDOW_STEPS)

    def add(self, seconds: float) -> bool:
        """Record the duration of the step that just finished; return False for a warm-up step, which is not timed."""
        if self._warmup_left:
            self._warmup_left -= 1
            return False
        self._recent_s.append(seconds)
        return True

    def step_s(self) -> float | None:
        """Return the seconds that a step takes, None until enough steps were timed."""
        total = sum(self._recent_s)
        if len(self._recent_s) < MIN_STEPS or (total < MIN_SECONDS and len(self._recent_s) < WINDOW_STEPS):
            return None
        return total / len(self._recent_s)


class Progress:
    """A live line on a terminal; elsewhere (a log file) a line now and then. Silent unless `visible`."""

    def __init__(self, *, visible: bool, step: int, total_steps: int) -> None:
        self.visible = visible
        self.total_steps = total_steps
        self._begin = step
        self._next_line_s = 0.0
        self._bar: tqdm[Any] | None = None

    def update(self, step: int, epoch: float, loss: float, lr: float, rate: str) -> None:
        """Show where the run is; `rate` is the throughput and the time left, as text."""
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
            self.say(f"step {step}/{self.total_steps}, epoch {epoch:.2f}: {text}")

    def say(self, text: str) -> None:
        """Print a message above the live line."""
        if self.visible:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """End the live line."""
        if self._bar is not None:
            self._bar.close()


class CountBar(tqdm):
    """tqdm that also serves a log: on a terminal a live bar; elsewhere a line now and then, with rate and time left.

    Args:
        total: How many there are.
        title: What is done with them.
        unit: What they are, e.g. "img".
    """

    def __init__(self, *, total: int, title: str, unit: str) -> None:
        self._live = sys.stderr.isatty()
        form = None if self._live else "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left"
        every_s = 0.1 if self._live else LINE_EVERY_S
        # delay: the first line is due after that time too, so that what is quick says nothing in a log
        super().__init__(
            total=total, desc=title, unit=unit, leave=False, bar_format=form, mininterval=every_s, delay=every_s
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar or print the line; called by tqdm."""
        if self._live:
            super().display(msg, pos)
        elif msg is None:  # "" is how tqdm takes a bar away
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
