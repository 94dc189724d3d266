"""The toy, whose processes get into trouble: TROUBLE says which, ON is the rank. A script, and a module."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch import distributed
from torch._dynamo.callback import on_compile_start
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
import toy

from moa_train import atomic_io, failures
from moa_train.signals import ignore_stop_signals
from moa_train.trainer import NonFiniteError, run

AT = 3
"""The step, from 0, in which it happens."""


class DataError(Exception):
    """An error that the task expects."""


class Troubled(toy.ToyTask):
    def __init__(self, config):
        super().__init__(config)
        self.mine = os.environ.get("RANK", "0") == os.environ.get("ON")
        self.trouble = os.environ.get("TROUBLE", "")
        if self.mine and self.trouble == "build":
            raise DataError("the data of this process are not there")
        if self.mine and self.trouble == "bug in build":
            raise KeyError("a bug")
        if self.mine and self.trouble == "SIGUSR1 in build":
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1000)  # for a server that is away

    def train_batches(self, share, plan, start_step):
        loader = super().train_batches(share, plan, start_step)
        if self.trouble != "killed":
            return loader
        # A worker, which has all that is open, too.
        return DataLoader(loader.dataset, batch_size=None, num_workers=1, worker_init_fn=ignore_stop_signals)

    def loss(self, model, batch):
        if batch[0] == AT and (self.mine or self.trouble == "everywhere"):
            self.get_into_trouble()
        if batch[0] == AT and self.trouble == "bug beside one that hangs":
            time.sleep(1000)
        return super().loss(model, batch)

    def val_batches(self, share):
        for batch in super().val_batches(share):
            if self.mine and self.trouble == "SIGUSR1 in validation":
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    def get_into_trouble(self):
        if self.trouble in ("bug", "everywhere", "bug beside one that hangs"):
            raise RuntimeError("a bug in the loss")
        if self.trouble == "data":
            raise DataError("sample 17 cannot be read")
        if self.trouble == "nan":
            raise NonFiniteError("the loss is nan")
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble in ("hangs", "hangs for long"):
            time.sleep(1000)
        if self.trouble == "launcher killed":
            os.kill(os.getppid(), signal.SIGKILL)
        if self.trouble in ("SIGTERM", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, self.trouble))


def prepare_trouble(trouble):
    """Have the signal come from inside what is not the task's; have gloo give up after 20 seconds, not 30 minutes."""
    if trouble == "hangs":
        begin = distributed.init_process_group
        distributed.init_process_group = lambda **given: begin(**given | {"timeout": timedelta(seconds=20)})
    if trouble == "SIGTERM before the other comes":
        if os.environ["RANK"] != os.environ["ON"]:
            time.sleep(1000)
        begin = distributed.init_process_group
        later = threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM])
        distributed.init_process_group = lambda **given: (later.start(), begin(**given))
    if trouble == "SIGUSR1 in build":  # on a machine so busy that process 0 has not let the other in yet
        admit = failures._Hub._admit
        failures._Hub._admit = lambda hub, connection: (time.sleep(1), admit(hub, connection))
    if trouble == "SIGUSR1 in compile":
        on_compile_start(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    if trouble == "SIGUSR1 in a checkpoint":
        sync = atomic_io.sync_file
        atomic_io.sync_file = lambda path: (os.kill(os.getpid(), signal.SIGUSR1), sync(path))


def main(arguments):
    """Run the toy."""
    prepare_trouble(os.environ.get("TROUBLE"))
    config = toy.parse_config(toy.ToyConfig, arguments, program="toy", summary="A toy.")
    return run(config, lambda: Troubled(config), mutable_keys=toy.RESUME_MUTABLE_KEYS | toy.TROUBLE)


def forked(environment, arguments, stdout, stderr):
    """Be a process of its own, as a launcher would have started it, in a fork of one that has loaded all of this."""
    os.environ.update(environment)
    if environment["TROUBLE"] == "launcher killed" and (run := os.fork()):  # the launcher is this process
        Path(f"{stdout}.pid").write_text(f"{run}")
        os.waitpid(run, 0)
    if environment["TROUBLE"] == "launcher killed":
        os.environ["ACCELERATE_DYNAMO_MODE"] = "default"
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    sys.argv[1:] = arguments
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
