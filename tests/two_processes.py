"""Run several trainings one after the other in two processes, forked from one that has imported all modules.

The argument is a JSON file with a list of jobs: "main", a module or script with a function `main(arguments)`;
"arguments"; "fsdp", whether to use FSDP2; "last", the step in which the processes receive SIGTERM; "code", the expected
exit code (0). Each run folder gets spread.json: the kinds of parameters and optimizer state on rank 1, and the steps
and a checksum of the weights of each rank.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moa_train.distributed import full
from moa_train.trainer import Trainer

WORLD_SIZE = 2

trainers = []
construct = Trainer.__init__


def constructed(trainer, *arguments, **named):
    construct(trainer, *arguments, **named)
    trainers.append(trainer)


@contextlib.contextmanager
def stopping(last):
    """Send SIGTERM to this process in the step `last` (from 1) of its run; None: in none."""
    train_step = Trainer.train_step

    def stopped(trainer, batches):
        if trainer.state.step + 1 == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, batches)

    Trainer.train_step = stopped
    try:
        yield
    finally:
        Trainer.train_step = train_step


def refuse(*arguments, **named):
    raise AssertionError("something was unpickled")


def kind(tensor):
    return "shard" if isinstance(tensor, DTensor) else "whole"


def progress(trainer):
    """Return values that must agree on all ranks."""
    weights = [full(parameter.detach()).numpy().tobytes() for parameter in trainer.bare.parameters()]
    sha256 = hashlib.sha256(b"".join(weights)).hexdigest()
    return {"steps": trainer.state.step, "skipped": trainer.state.skipped, "weights": sha256}


def load(main):
    """Return the function `main` of a module or a script."""
    folder, _, module = main.removesuffix(".py").rpartition("/")
    sys.path.insert(0, folder or sys.path[0])
    return importlib.import_module(module).main


def run(job):
    os.environ |= {"ACCELERATE_USE_FSDP": str(job.get("fsdp", False)).lower(), "FSDP_VERSION": "2"}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainers.clear()
    with stopping(job.get("last")):
        code = load(job["main"])(job["arguments"])
    assert code == job.get("code", 0), (code, job)
    everyones = [None] * WORLD_SIZE
    dist.all_gather_object(everyones, [progress(trainer) for trainer in trainers])
    if dist.get_rank() == 1 and trainers:
        (trainer,) = trainers
        states = [s for slots in trainer.optimizer.state.values() for key, s in slots.items() if key != "step"]
        parameters = list(trainer.bare.parameters())
        seen = {
            "world_size": dist.get_world_size(),
            "timeout_s": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
            "model": type(trainer.model).__name__,
            "parameters": sorted({kind(parameter) for parameter in parameters}),
            "optimizer": sorted({kind(state) for state in states}),
            "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters),
            "all": sum(p.numel() for p in parameters),
            "ranks": [own[0] for own in everyones if own],
        }
        (trainer.folder.path / "spread.json").write_text(json.dumps(seen))
    dist.barrier()


def be(rank, jobs):
    """Run the jobs as one rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    Trainer.__init__ = constructed
    PartialState.destroy_process_group = lambda state, group=None: None  # the next job uses it
    pickle.load = torch.load = refuse
    for job in jobs:
        run(job)
    dist.destroy_process_group()


def fork(rank, jobs):
    """Start a process; return its ID."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        be(rank, jobs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(jobs):
    for job in jobs:
        load(job["main"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= place | {"ACCELERATE_USE_CPU": "true"}
    children = [fork(rank, jobs) for rank in range(WORLD_SIZE)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
