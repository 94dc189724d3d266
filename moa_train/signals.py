"""Stop requests: Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) become a flag that the loop reads at safe points."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import connection, parent_process
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop, has saved and can be continued: EX_TEMPFAIL of sysexits.h, "try again
later". A requeue tells it from success (0), failure (1), a wrong configuration (2) and a kill (128 + signal).

Of several processes all end with it. Slurm's srun ends with it too, and so does `python -m moa_train.launch`;
`torchrun` and `accelerate launch` end with 1 whatever the run's code is. To srun itself send SIGUSR1, which it passes
on to all processes; of SIGTERM it kills them, unsaved."""

IMPATIENCE_S = 3.0
"""A later Ctrl-C interrupts at once; torchrun passes the terminal's first one on a second time, much sooner."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequests:
    """Within the `with` block, catch the stop signals; `received` is the first one's name, or "" while there is none.

    Ctrl-C again, some seconds later, interrupts at once, for someone who does not want to wait for the step to end.
    """

    def __init__(self) -> None:
        self.received = ""
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._received_at > IMPATIENCE_S:
            raise KeyboardInterrupt


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave stop signals to the main process, and end with it; for a DataLoader's `worker_init_fn`.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of the group: workers that died of it would take
    away the batches that the main process needs to end its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if parent_process() is not None:
        end_with_parent()  # torch looks for the parent's number, which a fork server's workers do not see change


def end_with_parent() -> None:
    """In a worker process: end as soon as the process that started it has ended, however that was.

    A parent that is killed tells its workers nothing. Forked ones would wait for work for ever, and hold its locks.

    Raises:
        ValueError: this is no process that multiprocessing has started.
    """
    parent = parent_process()
    if parent is None:
        raise ValueError("end_with_parent was called in a main process; call it in a worker")

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
