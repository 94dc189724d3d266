"""torchrun for runs that are stopped and continued: `python -m moa_train.launch`, with torchrun's arguments.

`torchrun` and `accelerate launch` end with 1 whatever the run's exit code was, so that a run that was stopped and
saved looks like one that failed. Asked to stop, they kill the run 30 seconds later, saved or not; SIGUSR1, Slurm's
warning, kills them, and the run is left to notice that and to stop by itself. Here stop signals are passed on to the
run's processes, which save and end in their own time, and the exit code is theirs: 0, 1, 2 or 75
(`moa_train.signals.EXIT_STOPPED`), or 128 + the signal that killed the first of them.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from moa_train.signals import EXIT_STOPPED, SIGNALS

NOISY = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)
"""Loggers that call every exit code but 0 a failure."""


class Stop:
    """The request to stop, passed on to the run's processes as SIGTERM, which leaves data workers alone."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take the signal `number`."""
        self.requested = True
        children = psutil.Process().children()
        for child in children:
            child.send_signal(signal.SIGTERM)
        if not children:  # still waiting for other machines
            raise SystemExit(EXIT_STOPPED)


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments` and return the run's exit code."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = run.parse_args(list(arguments))
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are ours
    try:
        run.determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        asked = f"--nproc-per-node is {options.nproc_per_node}: {error}"
        print(f"error: {asked} Give it a number; with scripts/cluster/torchrun.sh: GPUS=N", file=sys.stderr)
        return 2
    stop = Stop()
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        run.run(options)
    except ChildFailedError as error:
        return exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, error, stop.requested)
    return 0


def exit_code(codes: dict[int, int], error: ChildFailedError, stopping: bool) -> int:
    """Return the run's exit code, given each failed rank's (negative: the signal that killed it).

    A process that was asked to stop before it could take signals is killed by SIGTERM: stopped, with nothing to save.
    """
    if EXIT_STOPPED in codes.values() or (stopping and -signal.SIGTERM in codes.values()):
        return EXIT_STOPPED
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    print(f"error: process {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
    return 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
