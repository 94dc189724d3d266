"""Stop requests: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C set a flag that the training loop reads."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import connection, parent_process
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again later"."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

REPEAT_S = 3.0
"""A Ctrl-C that follows another after this time interrupts at once; launchers repeat the first one sooner."""

LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
"""Environment variables that torchrun and accelerate set in the processes that they start."""


class StopRequests:
    """Context that catches the stop signals.

    The end of a torchrun or accelerate launcher is a stop request too: `accelerate launch` with one process does not
    forward the signal that ends it.

    Attributes:
        received: Name of the first signal, "" while there is none.
        exit_at_once: End the process within the signal handler, for phases with nothing to save.
    """

    def __init__(self) -> None:
        self.received = ""
        self.exit_at_once = False
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        if any(name in os.environ for name in LAUNCHER_VARIABLES):
            threading.Thread(target=_stop_with_launcher, args=[os.getppid()], daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # The first rank that ends with 75 makes srun end the others, whose code would then be 143.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.exit_at_once:
            if number == signal.SIGTERM and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                os._exit(128 + number)  # a launcher sends it after the failure of another rank
            os.write(1, f"stopped     {name} before training; the same command starts it again\n".encode())
            os._exit(EXIT_STOPPED)
        if not self.received:
            self.received, self._received_at = name, now
        elif number == signal.SIGINT and now - self._received_at > REPEAT_S:
            raise KeyboardInterrupt


def _stop_with_launcher(launcher: int, interval_s: float = 1.0) -> None:
    while os.getppid() == launcher:
        time.sleep(interval_s)
    os.kill(os.getpid(), signal.SIGTERM)


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave stop signals to the main process, and end with it; a DataLoader's `worker_init_fn`.

    A terminal sends Ctrl-C, and Slurm its signals, to all processes of the group. A worker that ended then would take
    along the batches that the main process needs to finish its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if parent_process() is not None:
        end_with_parent()


def end_with_parent() -> None:
    """End this worker process as soon as its parent has ended; for processes that multiprocessing has started.

    A killed parent cannot tell its workers: they would wait for work forever and keep its files locked.
    """
    parent = parent_process()
    assert parent is not None, "end_with_parent is called in a worker process"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
