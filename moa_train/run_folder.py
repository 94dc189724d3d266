"""The run folder: configuration, environment, one row an event, and a summary; see `RunFolder`."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from moa_train.atomic_io import LineFile, write_json, write_text
from moa_train.config import RESUME_MUTABLE_KEYS, differing_keys
from moa_train.errors import require
from moa_train.reading import read_json, read_yaml
from moa_train.signals import LAUNCHED

if TYPE_CHECKING:
    import torch  # imported where a device is described: who only reads run folders need not wait for it

Row = dict[str, Any]

KINDS = ("train", "val")
"""Kinds of rows."""


LEASE_S = 200
"""How long a file server may keep the locks of a machine that is gone: a lease and a grace of NFS, 90 s each."""


class RunInUse(Exception):
    """Another process runs the same run."""


class RunFolder:
    """The files of one run.

    config.yaml     the resolved configuration           env.json        versions, device, git commit, command
    metrics.jsonl   a JSON object a line, in order       summary.json    what the run came to
    events.jsonl    what happened beside, likewise       checkpoints/    see checkpoint.py
    trackers/       files of trackers, and the run's id for them
    reconstructions/, mixing/, export/ ...  what the task draws, notes and exports
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.trackers = path / "trackers"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self._summary = path / "summary.json"
        self._metrics_lines, self._events_lines = LineFile(self.metrics), LineFile(self.events)

    def check(self, tree: dict[str, Any], resume: str, mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS) -> list[str]:
        """Return the keys in which the folder's run differs from `tree`, if it may be continued all the same.

        Raises:
            ValueError: the folder holds a run and `resume` is "never", or other keys than `mutable_keys` differ and
                it is not "force"; the message names them.
        """
        if not self.rows() and not any(self.checkpoints.glob("step_*")):
            return []
        if resume == "never":
            raise ValueError(
                f"{self.path} already holds a run and resume is 'never'; choose another name or delete the folder"
            )
        try:
            old = read_yaml(self.path / "config.yaml", "bring it back, or continue all the same with --resume force")
        except ValueError:
            if resume != "force":
                raise
            return ["all keys: config.yaml cannot be read"]
        different = differing_keys(old, tree, mutable_keys=mutable_keys)
        if different and resume != "force":
            listed = "\n  ".join(different)
            raise ValueError(
                f"{self.path} holds a run with another configuration:\n  {listed}\n"
                "Choose another name, go back to these values, or continue all the same with --resume force."
            )
        return different

    def open(self, tree: dict[str, Any], environment: dict[str, Any]) -> None:
        """Create the folder if need be and write config.yaml and env.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(tree, sort_keys=False))
        write_json(self.path / "env.json", environment)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running this run at the same time. Raises RunInUse if one does.

        A POSIX record lock: it ends with this process, however that ends, and its workers do not inherit it. Where a
        whole machine is gone, the file server lets go of its locks only after a while, which is waited for.
        """
        with (self.path / "run.lock").open("a+", encoding="utf-8") as file:
            self._lock(file, time.monotonic() + LEASE_S)
            file.truncate(0)
            file.write(f"{platform.node()} {os.getpid()}\n")
            file.flush()
            yield

    def _lock(self, file: TextIO, deadline: float) -> None:
        told = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder, _, pid = file.read().strip().partition(" ")
                elsewhere = holder not in ("", platform.node())
                if not elsewhere or time.monotonic() > deadline:
                    where = f" (process {pid} on {holder})" if holder else ""
                    raise RunInUse(
                        f"{self.path} is being run by another process{where}, which holds {file.name}; wait until it "
                        "has ended, stop it, or choose another name"
                    ) from error
                if not told:
                    print(f"waiting for {holder}, which holds {file.name}, up to {LEASE_S} s", file=sys.stderr)
                told = True
                time.sleep(1)
            except OSError as error:  # a file system without locks
                print(
                    f"warning: {file.name} cannot be locked ({error}): a second process that runs this run would not "
                    "be refused, and both would write to its folder",
                    file=sys.stderr,
                )
                return
            else:
                return

    def rows(self) -> list[Row]:
        """Return the rows written so far; a last line cut short by a crash is left out.

        Raises ValueError naming the line that is no row.
        """
        if not self.metrics.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                rows.append(parse_row(line))
            except ValueError as error:
                raise ValueError(f"{self.metrics} line {number} is no metrics row ({error}); delete it") from error
        return rows

    def truncate(self, step: int, validated: int) -> None:
        """Drop, in one rename, the training rows after `step` and the validation rows after `validated`."""
        last = {"train": step, "val": validated}
        kept = [row for row in self.rows() if row["step"] <= last[row["kind"]]]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Row) -> None:
        """Add a row; NaN becomes null. Raises OSError as `LineFile.append` does."""
        self._metrics_lines.append(json.dumps(_with_null(row)))

    def append_event(self, row: Row) -> None:
        """Add a row to events.jsonl; NaN becomes null. Raises OSError likewise.

        No row is ever taken back: steps that are taken again after a crash leave theirs a second time.
        """
        self._events_lines.append(json.dumps(_with_null(row)))

    def summarize(self, facts: dict[str, Any], best_by: str) -> None:
        """Write summary.json: `facts` and what the rows say; `best_by` is the validation key that is to be low."""
        write_json(self._summary, {**facts, **summarize_rows(self.rows(), best_by)})

    def summary(self) -> dict[str, Any]:
        """Return summary.json. Raises ValueError if it is missing, or is none that `summarize` wrote."""
        remedy = "delete it, and the run's command writes it again"
        summary = read_json(self._summary, remedy)
        final = summary.get("final") or {}
        numbers = [summary.get(key) for key in ("steps", "wall_s", "throughput", "train_loss")]
        numbers += final.values() if isinstance(final, dict) else "?"
        known = all(value is None or _is_number(value) for value in numbers)
        if not (isinstance(summary.get("status"), str) and known):
            fields = "status, steps, wall_s, throughput, train_loss or final"
            raise ValueError(f"{self._summary} has no usable {fields}; {remedy}")
        return summary

    def finished_steps(self) -> int | None:
        """Return how many steps the run came to, if it has been finished."""
        return self.summary().get("steps") if self.status() == "finished" else None

    def status(self) -> str:
        """Return the summary's status, "unfinished" while there is no summary that can be read."""
        try:
            return self.summary()["status"]
        except ValueError:  # the run goes on from its newest checkpoint, and writes another at its end
            return "unfinished"


def parse_row(line: str | bytes) -> Row:
    """Return a line of metrics.jsonl as a row: "kind", "step", and numbers or None; NaN and infinity become None.

    Raises ValueError for what is no such row.
    """
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"it holds a {type(row).__name__}, not an object")
    kind, step = row.get("kind"), row.get("step")
    require("kind", kind, kind in KINDS, "train or val")
    require("step", step, _is_number(step) and isinstance(step, int) and step >= 0, "a whole number, 0 or above")
    for key, value in row.items():
        require(key, value, key == "kind" or value is None or _is_number(value), "a number or null")
    return _with_null(row)


def _with_null(row: Row) -> Row:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number that fits into 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def summarize_rows(rows: Iterable[Row], best_by: str) -> dict[str, Any]:
    """Return final and best validation losses, and the last training loss."""
    rows = list(rows)
    val = [row for row in rows if row["kind"] == "val"]
    train = [row for row in rows if row["kind"] == "train"]
    best = min((row for row in val if row.get(best_by) is not None), key=lambda row: row[best_by], default=None)
    return {
        "final": _losses(val[-1]) if val else None,
        "best": {**_losses(best), "step": best["step"]} if best else None,
        "train_loss": train[-1].get("loss") if train else None,
    }


def _losses(row: Row) -> Row:
    place = ("kind", "step", "epoch", "samples", "tokens", "wall_s")
    return {key: value for key, value in row.items() if key not in place}


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what env.json holds: versions of every imported package, device, processor, git commit, command line."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "world_size": world_size,
        "git_commit": _git_commit(),
        "command": command_line(),
        "packages": _imported_packages(),
    }


def command_line() -> str:
    """Return the command that started this run, as a shell takes it; of a launched one what the launcher started."""
    return shlex.join(sys.argv if _launched() else [Path(sys.executable).name, *sys.argv])


def again(*options: str) -> str:
    """Return the end of a sentence about running the command again: the command, once with each of the options."""
    aside = " (by the same launcher, whose own options are not shown)" if _launched() else ""
    return f"{aside}:" + "".join(f"\n  {command_line()} {option}".rstrip() for option in options or [""])


def _launched() -> bool:
    return any(name in os.environ for name in (*LAUNCHED, "WORLD_SIZE"))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit of the checkout this file is in, "-dirty" appended if it was changed; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _imported_packages() -> dict[str, str]:
    modules = {name.partition(".")[0] for name in sys.modules}
    by_module = metadata.packages_distributions()
    names = {name for module in modules for name in by_module.get(module, ())}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}
