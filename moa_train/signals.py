"""Stop requests: Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) become a flag that the loop reads at safe points."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from pathlib import Path
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

LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
"""Variables of which torchrun and accelerate set one in every process that they start, and hardly anybody by hand."""

LAUNCHER_S = 1.0
"""Seconds within which it is noticed that the launcher has ended."""

PROC = Path("/proc")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequests:
    """Within the `with` block, catch the stop signals; `received` is the first one's name, or "" while there is none.

    Ctrl-C again, some seconds later, interrupts at once, for someone who does not want to wait for the step to end.

    The end of the launcher is a stop request too. SIGUSR1 ends torchrun and `accelerate launch`, and SIGTERM the
    latter with one process, none of which tell the run: it would go on for days, with nobody to know of it, and keep
    its folder and the device. Other parents may end as they like: a shell does under nohup.
    """

    def __init__(self) -> None:
        self.received = ""
        self._over = threading.Event()
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        if any(name in os.environ for name in LAUNCHED):
            threading.Thread(target=self._watch_launcher, args=[os.getppid()], daemon=True).start()
        return self

    @contextmanager
    def at_once(self, end: Callable[[str], object]) -> Iterator[None]:
        """Within the block, while there is nothing to save yet, a stop request calls `end(name)`, to end the process.

        It does in another thread: the main one may be in C for hours, as until all processes have come, and Python
        calls no handler meanwhile.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)

        def watch() -> None:
            for byte in iter(lambda: os.read(reading, 1), b"\0"):
                if byte[0] in SIGNALS:
                    end(signal.Signals(byte[0]).name)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        _WAKING.add(writing)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            if self.received:  # it came before this block
                os.write(writing, bytes([signal.Signals[self.received]]))
            yield
        finally:
            signal.set_wakeup_fd(before)
            _WAKING.discard(writing)
            os.write(writing, b"\0")  # not closed: a forked worker may hold that end too
            watcher.join()
            os.close(reading)
            os.close(writing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _watch_launcher(self, launcher: int) -> None:
        # Not Linux's PR_SET_PDEATHSIG: that is about the thread that started this process, not about its process.
        gone = _takes_in_orphans(launcher)  # it ended while this process was importing
        while not gone:
            if self._over.wait(LAUNCHER_S):
                return
            gone = os.getppid() != launcher
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._received_at > IMPATIENCE_S:
            raise KeyboardInterrupt


_WAKING: set[int] = set()
"""Descriptors that tell this process of signals. One to a worker that is forked from it is no news of this one's."""


def _fall_asleep() -> None:
    if _WAKING:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_fall_asleep)


def _takes_in_orphans(process: int) -> bool:
    """Whether a parent is no launcher but what processes get whose own has ended; False where that is uncertain.

    That is process 1, unless it is in Python, as launchers are: one may be a container's first. Or a user's systemd.
    """
    try:
        program = (PROC / f"{process}/cmdline").read_bytes().partition(b"\0")[0].rpartition(b"/")[2]
    except OSError:
        program = b""
    return program == b"systemd" or (process == 1 and not program.startswith(b"python"))


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
