"""Errors that end in one line on stderr and an exit code. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

PRINT_S = 3.0
"""Seconds that other ranks leave local rank 0 to print an error which all of them have."""


class ReportedError(Exception):
    """An error that `report` prints in one line, without a traceback.

    Attributes:
        exit_code: Exit code of the process.
        on_all_ranks: Whether all ranks raise it, so that one of them prints it.
    """

    exit_code = 1
    on_all_ranks = False


class ConfigError(ReportedError, ValueError):
    """A setting that is not allowed; the message names the key, its value and what is allowed."""

    exit_code = 2
    on_all_ranks = True


class DataError(ReportedError, ValueError):
    """A file, data set or sample that cannot be used; the message names it and the remedy."""

    exit_code = 2


class RunError(ReportedError, RuntimeError):
    """A run that failed for a reason which its message explains in full."""


def require(key: str, value: Any, allowed: bool, wanted: str) -> None:
    """Raise ConfigError naming the key, its value and what is allowed, unless `allowed`."""
    if not allowed:
        raise ConfigError(f"{key} is {value!r}; it must be {wanted}")


def message(error: Exception) -> str:
    """Return an error's message without the worker traceback that torch's DataLoader puts around it."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.rpartition(f"{type(error).__name__}: ")[2].rstrip()
    return text


def report(error: ReportedError) -> int:
    """Print an error on stderr and return its exit code.

    Local rank 0 prints an error that all ranks have.
    """
    if error.on_all_ranks and os.environ.get("LOCAL_RANK", "0") != "0":
        wait_for_local_rank_0()
    else:
        print(f"error: {message(error)}", file=sys.stderr, flush=True)
    return error.exit_code


def wait_for_local_rank_0() -> None:
    """Give local rank 0 time to print an error of all ranks: launchers send SIGTERM as soon as one rank has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(PRINT_S)
