"""Data workers: they end with the program, and their death or lack of memory is one message."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moa_train.data_order import batch_loader, worker_died

SCRIPT = """
import sys
from torch.utils.data import Dataset
from moa_train.data_order import batch_loader, worker_died
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
def test_program_ends_with_a_loader_that_was_not_read_to_the_end():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_killed_worker_is_one_message(runs, monkeypatch, capsys):
    class Killed(runs.toy.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                if batch[0] == 6:
                    time.sleep(2)  # until earlier batches are received: their tensors come through this process
                    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
                yield batch

    def with_a_worker(task, share, plan, start_step):
        return DataLoader(Killed(task.config, share, plan, start_step), batch_size=None, num_workers=1)

    with monkeypatch.context() as patch:
        patch.setattr(runs.toy.ToyTask, "train_batches", with_a_worker)
        assert runs("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a data worker was killed (") and error.count("\n") == 1
    assert "fewer data.workers" in error
    assert runs.json("run", "summary.json")["status"] == "failed"
    assert runs("run") == 0
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))


def test_worker_killed_while_its_batch_is_received():
    class Gone:
        def detach(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError) as broken:
        torch.multiprocessing.reductions.rebuild_storage_fd(torch.UntypedStorage, Gone(), 8)
    assert "a data worker was killed (" in str(worker_died(broken.value))
    assert worker_died(ConnectionResetError(104, "a server's")) is None


class Listed(Dataset):
    def __init__(self, batches):
        self.batches = list(batches)

    def __getitems__(self, where):
        return self.batches[where[0]]


def test_full_shared_memory_is_one_message(runs, monkeypatch, capsys):
    def full(storage):  # torch's error in Docker's 64 MB
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def with_a_worker(task, share, plan, start_step):
        batches = Listed(runs.toy.Batches(task.config, share, plan, start_step))
        loader = batch_loader(batches, [[number] for number in range(len(batches.batches))], workers=1)
        loader.timeout = 60  # a lost batch fails the test
        return loader

    monkeypatch.setattr(runs.toy.ToyTask, "train_batches", with_a_worker)
    with monkeypatch.context() as patches:
        patches.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # in the forked workers
        assert runs("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: data.workers is 1, and a batch does not fit into shared memory")
    assert "--shm-size" in error and error.count("\n") == 1
    assert runs("run") == 0
