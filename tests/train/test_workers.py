"""Workers of loaders end with the program, whatever has become of the loader."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moa_train.data_order import batch_loader
from moa_train.run_logger import Journal

SCRIPT = """
import numpy as np
from torch.utils.data import Dataset
from moa_train.data_order import batch_loader
from moa_train.signals import ignore_stop_signals

class Numbers(Dataset):
    def __getitems__(self, where):
        return where

class Cycle:
    pass

def leave_a_loader_in_a_cycle():
    loader = batch_loader(Numbers(), [[i] for i in range(100)], workers=1)
    loader.worker_init_fn = ignore_stop_signals
    cycle = Cycle()
    cycle.itself, cycle.batches = cycle, iter(loader)
    print(next(cycle.batches))

leave_a_loader_in_a_cycle()
"""


@pytest.mark.slow
def test_a_program_ends_though_its_loader_was_not_read_to_the_end():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_a_worker_that_is_killed_is_told_in_one_message(runs, monkeypatch, capsys):
    batches = runs.toy.ToyTask.train_batches

    class Killed(runs.toy.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                if batch[0] == 6:
                    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
                yield batch

    def with_a_worker(task, share, plan, start_step):
        batches = Killed(task.config, share, plan, start_step)
        return DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=2)

    monkeypatch.setattr(runs.toy.ToyTask, "train_batches", with_a_worker)
    assert runs("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a process that reads the data has ended (DataLoader worker")
    assert "fewer data.workers" in error and "Traceback" not in error
    assert runs.json("run", "summary.json")["status"] == "failed"
    monkeypatch.setattr(runs.toy.ToyTask, "train_batches", batches)
    assert runs("run") == 0
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))


def test_a_worker_whose_death_is_noticed_late_is_told_all_the_same(runs, monkeypatch, capsys):
    """Its socket closes first; torch's signal handler raises while the failure is being recorded."""
    died = [RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")]
    note_memory = Journal.note_memory

    def interrupted(journal):
        if journal.state.step == 3 and died:
            raise died.pop()
        note_memory(journal)

    def cut(task, share, plan, start_step):
        for number, batch in enumerate(train_batches(task, share, plan, start_step)):
            if number == 6:
                raise ConnectionResetError("reset by peer")
            yield batch

    train_batches = runs.toy.ToyTask.train_batches
    monkeypatch.setattr(runs.toy.ToyTask, "train_batches", cut)
    monkeypatch.setattr(Journal, "note_memory", interrupted)
    assert runs("run") == 1
    assert capsys.readouterr().err.startswith("error: a process that reads the data has ended (DataLoader worker")
    assert runs.json("run", "summary.json")["status"] == "failed"


class Listed(Dataset):
    """The batches of a list."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __getitems__(self, where):
        return self.batches[where[0]]


def test_a_batch_that_does_not_fit_into_shared_memory_is_reported_in_one_message(runs, monkeypatch, capsys):
    def full(storage):  # what torch raises in Docker's 64 MB
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def with_a_worker(task, share, plan, start_step):
        batches = Listed(runs.toy.Batches(task.config, share, plan, start_step))
        loader = batch_loader(batches, [[number] for number in range(len(batches.batches))], workers=1)
        loader.timeout = 60  # a batch that is lost fails this test; without it, it would never end
        return loader

    monkeypatch.setattr(runs.toy.ToyTask, "train_batches", with_a_worker)
    with monkeypatch.context() as patches:
        patches.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # in the workers that are forked from here
        assert runs("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: data.workers is 1, and a batch of one does not fit into shared memory (/dev/shm:")
    assert "--shm-size" in error and error.count("\n") == 1
    assert runs.json("run", "summary.json")["status"] == "failed"
    assert runs("run") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("size", "reported"), [("8m", "does not fit into shared"), ("4k", "cannot be started")])
def test_small_shared_memory(size, reported):
    mounted = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small /dev/shm needs privileges; the test above simulates it")
    script = SCRIPT.replace("return where", "import torch; return torch.zeros(1000, 1000, 8)")
    done = subprocess.run([*mounted, sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "data.workers is 1, and" in done.stderr and reported in done.stderr
