"""Runs several trainings one after the other in the processes of one launch, which takes seconds to start.

Its argument is a JSON file with a list of jobs: "main", a module or a script with a function `main(arguments)`;
"arguments"; "fsdp", whether the model is to be in shards; "code", the exit code that is expected, 0 unless given.
Beside each run's files it leaves RUN/spread.json: what the parameters and the optimizer's state were, seen on rank 1.
"""

import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moa_train.loop import Trainer

trainers = []
construct = Trainer.__init__


def constructed(trainer, *arguments, **named):
    construct(trainer, *arguments, **named)
    trainers.append(trainer)


def refuse(*arguments, **named):
    raise AssertionError("something was unpickled")


def kind(tensor):
    return "shard" if isinstance(tensor, DTensor) else "whole"


def run(job):
    os.environ |= {"ACCELERATE_USE_FSDP": str(job.get("fsdp", False)).lower(), "FSDP_VERSION": "2"}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainers.clear()
    folder, _, module = job["main"].removesuffix(".py").rpartition("/")
    sys.path.insert(0, folder or sys.path[0])
    main = importlib.import_module(module).main
    code = main(job["arguments"])
    assert code == job.get("code", 0), (code, job)
    if dist.get_rank() == 1 and trainers:
        (trainer,) = trainers
        states = [s for slots in trainer.optimizer.state.values() for key, s in slots.items() if key != "step"]
        parameters = list(trainer.bare.parameters())
        seen = {
            "world_size": dist.get_world_size(),
            "model": type(trainer.model).__name__,
            "parameters": sorted({kind(parameter) for parameter in parameters}),
            "optimizer": sorted({kind(state) for state in states}),
            "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters),
            "all": sum(p.numel() for p in parameters),
        }
        (trainer.folder.path / "spread.json").write_text(json.dumps(seen))
    dist.barrier()


Trainer.__init__ = constructed
PartialState.destroy_process_group = lambda state, group=None: None  # the next job goes on with it
pickle.load = torch.load = refuse
for job in json.loads(Path(sys.argv[1]).read_text()):
    run(job)
dist.destroy_process_group()
