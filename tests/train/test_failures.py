"""A process that fails or dies ends the others in time, and the first error is told once: with real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from moa_train import failures
from moa_train.failures import ENDED_WITHIN_S, GRACE_S, WORD_S, Together

CPU_2 = Path(__file__).parents[2] / "configs/accelerate/cpu_2.yaml"
BUG = "RuntimeError: a bug in the loss"


@pytest.mark.slow
@pytest.mark.parametrize("on", [0, 1])
def test_a_bug_is_shown_once_in_full(ranks, on):
    assert ranks("bug", on) == [1, 1]
    assert ranks.said.count("Traceback") == ranks.said.count(BUG) == 1, ranks.said
    assert "get_into_trouble" in ranks.said, "in full"
    assert "onnection" not in ranks.said and "ended without a word" not in ranks.said


@pytest.mark.slow
def test_a_bug_of_all_is_shown_once(ranks):
    assert ranks("everywhere") == [1, 1]
    assert ranks.said.count("Traceback") == ranks.said.count(BUG) == 1, ranks.said


@pytest.mark.parametrize(
    ("trouble", "on", "code", "message"),
    [
        pytest.param("build", 1, 2, "error: the data of this process are not there\n", marks=pytest.mark.slow),
        pytest.param("build", 0, 2, "error: the data of this process are not there\n", marks=pytest.mark.slow),
        ("data", 1, 1, "error: sample 17 cannot be read\n"),
        pytest.param("nan", 0, 1, "error: the loss is nan\n", marks=pytest.mark.slow),
    ],
    ids=["build on 1", "build on 0", "data on 1", "nan on 0"],
)
def test_an_expected_error_of_one_is_all_that_is_said(ranks, trouble, on, code, message):
    assert ranks(trouble, on) == [code, code]
    assert ranks.said == message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loop__trackers": '["nowhere"]'}, "error: loop.trackers"),
        ({"loop__micro_batch_size": "three"}, "toy: error: "),
    ],
    ids=["by run", "by parse_config"],
)
def test_a_wrong_configuration_is_told_by_one_of_a_machine(ranks, changed, message):
    """Before the processes know each other."""
    assert ranks(**changed) == [2, 2]
    assert ranks.said.startswith(message) and ranks.said.count("error: ") == 1, ranks.said


class DamagedError(Exception):
    pass


class Damaged(Dataset):
    def __getitem__(self, index):
        raise DamagedError("DamagedError: is sample 7,\nwhich is that kind of DamagedError: see above")


def test_an_error_from_a_loaders_worker_is_told_without_the_workers_traceback(capsys):
    with pytest.raises(DamagedError, match="Original Traceback") as caught:
        next(iter(DataLoader(Damaged(), batch_size=None, sampler=[0], num_workers=1)))
    assert Together().fail(caught.value, 1) == 1
    assert capsys.readouterr().err == (
        "error: DamagedError: is sample 7,\nwhich is that kind of DamagedError: see above\n"
    )


@pytest.mark.slow
def test_a_bug_before_training(ranks):
    assert ranks("bug in build", 1) == [1, 1]
    assert ranks.said.count("Traceback") == ranks.said.count("KeyError: 'a bug'") == 1, ranks.said


def is_open(path):
    """Whether some process has a file open."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("on", [0, 1])
def test_one_that_is_killed_ends_the_other_and_is_named(ranks, on):
    """Process 0 too, on which all depend; its data worker, which outlives it a little, does not hide its death."""
    codes = ranks("killed", on)
    assert codes[on] == -signal.SIGKILL and codes[1 - on] == 1
    assert ranks.said.count("error: ") == 1 and f"error: process {on} of 2 (" in ranks.said, ranks.said
    assert "Traceback" not in ranks.said
    deadline = time.monotonic() + 60
    while is_open(ranks.runs.out / "run.out"):
        assert time.monotonic() < deadline, "a worker outlives its process"
        time.sleep(0.1)
    if on == 0:
        assert ranks() == [0, 0], "and the same command continues"


@pytest.mark.slow
def test_one_that_hangs_is_left_to_the_process_group_whose_error_ends_it(ranks):
    assert ranks("hangs", 1) == [1, 1]
    assert ranks.said.count("Traceback") == 1 and "imed out" in ranks.said, ranks.said


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "bug"])
def test_the_others_end_within_the_time(ranks, killed):
    """However busy they are: one is in a step that takes for ever. Ten seconds more are this machine's own."""
    processes = ranks.start("hangs for long" if killed else "bug beside one that hangs", 1)
    deadline = time.monotonic() + 240
    while len(ranks.runs.rows("run", "train") if (ranks.runs.out / "run/metrics.jsonl").exists() else []) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if killed:
        processes[1].kill()
    begin = time.monotonic()
    assert ranks.end(processes) == [1, -signal.SIGKILL if killed else 1]
    assert time.monotonic() - begin < (GRACE_S if killed else WORD_S + GRACE_S) + 10
    assert ("error: process 1 of 2" if killed else BUG) in ranks.said


def test_a_machine_that_is_gone_is_noticed_within_the_time():
    """The kernel is told when to probe and when to give up; taking a machine away is beyond a test."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
    ):
        failures._keep(connection)
        failures._OURS.discard(connection)

        def option(name):
            return connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))

        probes = option("TCP_KEEPIDLE") + option("TCP_KEEPCNT") * option("TCP_KEEPINTVL")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert probes + GRACE_S <= ENDED_WITHIN_S and option("TCP_USER_TIMEOUT") / 1000 + GRACE_S <= ENDED_WITHIN_S


def test_a_stranger_at_the_port_is_nobody(monkeypatch):
    """What connects without the token, and goes, has not died."""
    said, ended = [], []
    monkeypatch.setattr(failures, "_say", said.append)
    monkeypatch.setattr(failures, "_end_soon", ended.append)
    hub = failures._Hub(2)
    for line in (b"", b"GET / HTTP/1.1\n", b"hello 17 1 1 host\n", b"\n", b"\xff\xfe\n", b"failed 1\n"):
        with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b"", "dropped"
    assert hub.first is None and not said and not ended


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun", "launch"])
def test_through_launchers(ranks, launcher):
    """Their own reports aside, which moa_train.launch does without."""
    modules = {
        "accelerate": f"accelerate.commands.launch --config_file {CPU_2}",
        "torchrun": "torch.distributed.run --standalone --nproc-per-node=2",
        "launch": "moa_train.launch --standalone --nproc-per-node=2",
    }
    environment = os.environ | {"TROUBLE": "bug", "ON": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = str(ranks.runs.script.with_name("troubled.py"))
    command = [sys.executable, "-m", *modules[launcher].split(), script, *ranks.runs.arguments("run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count(BUG) == 1 and "onnection closed" not in done.stderr, done.stderr
    assert launcher != "launch" or done.stderr.count("Traceback") == 1, done.stderr
