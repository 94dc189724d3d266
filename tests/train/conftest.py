import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

TOY = Path(__file__).with_name("toy.py")
TIMINGS = ("wall_s", "throughput", "mfu")

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(20_000 + 1_000 * (_WORKER % 10))


def load_toy():
    spec = importlib.util.spec_from_file_location("toy", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Runs:
    """Runs of the toy task below a temporary folder: 40 of 44 samples an epoch, 5 steps an epoch, 15 steps."""

    script = TOY

    def __init__(self, out):
        self.out = out
        self.toy = load_toy()

    def arguments(self, name, **changed):
        values = {
            "name": name,
            "out": self.out,
            "optim.lr": 0.01,
            "schedule.epochs": 3,
            "schedule.warmup_epochs": 0.5,
            "schedule.batch_size": 8,
            "loop.micro_batch_size": 4,
            "loop.log_every": 1,
            "loop.val_every": 4,
            "checkpoint.interval": 5,
            "loop.trackers": "[]",
        } | {key.replace("__", "."): value for key, value in changed.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    def __call__(self, name, **changed):
        """Run in this process; return the exit code."""
        AcceleratorState._reset_state(reset_partial_state=True)
        return self.toy.main(self.arguments(name, **changed))

    def rows(self, name, kind=None):
        """Return the metrics rows without timings."""
        lines = (self.out / name / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
        return [row for row in rows if kind in (None, row["kind"])]

    def json(self, name, path):
        return json.loads((self.out / name / path).read_text())

    def final(self, name):
        """Return the bytes of all tensors of the last checkpoint."""
        last = self.out / name / "checkpoints" / (self.out / name / "checkpoints" / "LAST").read_text().strip()
        tensors = {file.name: load_file(file) for file in sorted(last.glob("*.safetensors"))}
        return {(file, key): t.tobytes() for file, part in tensors.items() for key, t in part.items()}

    def assert_same(self, name, other):
        """Assert that two runs have the same rows, tensors and summary, apart from timings."""
        assert self.rows(name) == self.rows(other)
        assert self.final(name) == self.final(other)
        clock = ("name", "wall_s", "throughput", "peak_memory_mib")
        left, right = self.json(name, "summary.json"), self.json(other, "summary.json")
        assert {k: v for k, v in left.items() if k not in clock} == {k: v for k, v in right.items() if k not in clock}


@pytest.fixture(scope="session")
def make_runs():
    """Return the class of `runs`, for other folders than the test's."""
    return Runs


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


class Ranks:
    """Processes of the run `name` with the environment that srun gives them, forked from one that has loaded torch."""

    def __init__(self, runs, name="run"):
        self.runs, self.name = runs, name
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["toy"])
        self.stderr = ""  # of all processes

    def start(self, trouble="", on=0, count=2, **changed):
        """Start and return the processes; `trouble` happens on rank `on`."""
        shared = {"TROUBLE": trouble, "RANK_IN_TROUBLE": str(on), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if count > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
        processes = []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            files = [str(self.runs.out / f"{self.name}.{stream}") for stream in ("out", "err")]
            arguments = self.runs.arguments(self.name, **changed)
            target = importlib.import_module("toy").forked
            processes.append(self.context.Process(target=target, args=(shared | place, arguments, *files)))
            processes[-1].start()
        return processes

    def end(self, processes, seconds=900):
        """Wait for all processes; return their exit codes."""
        try:
            for process in processes:
                process.join(seconds)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
        err = self.runs.out / f"{self.name}.err"
        self.stderr = err.read_text()
        err.write_text("")
        return codes

    def __call__(self, trouble="", on=0, count=2, **changed):
        return self.end(self.start(trouble, on, count, **changed))


def free_port():
    """Return a port of this test worker's range, which lies below the ports that the system assigns."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)
    raise AssertionError("no port is free")


@pytest.fixture
def ranks(runs, monkeypatch):
    monkeypatch.syspath_prepend(TOY.parent)  # for the forks; for the process that they are forked from:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOY.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Ranks(runs)
