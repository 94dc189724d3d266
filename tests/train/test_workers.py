"""Workers of loaders end with the program, whatever has become of the loader."""

import subprocess
import sys

SCRIPT = """
import numpy as np
from torch.utils.data import Dataset
from moa_train.order import batch_loader
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


def test_a_program_ends_though_its_loader_was_not_read_to_the_end():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")
