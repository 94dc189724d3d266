"""Training script without a model: two steps an epoch, with a choice of troubles."""

import json
import os
import sys
import time
from dataclasses import dataclass, field

import yaml

from moa_train.config import EpochSchedule, RunConfig, as_tree, parse_config
from moa_train.signals import EXIT_STOPPED, StopRequests


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A run.

    Args:
        schedule: Length.
        trouble: What happens in the second step, or after the first.
    """

    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    trouble: str = "none"


def main(arguments):
    config = parse_config(Config, arguments, program="train.py", summary="A toy.")
    steps = int(2 * config.schedule.epochs)
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    (config.folder / "env.json").write_text(json.dumps({"total_steps": steps}))
    metrics = config.folder / "metrics.jsonl"
    first = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    print(f"starts at {first}, threads {os.environ.get('OMP_NUM_THREADS')}", flush=True)

    def write(step, loss):
        with metrics.open("a") as file:
            file.write(json.dumps({"kind": "train", "step": step, "epoch": step / 2, "loss": loss}) + "\n")

    def end(status):
        (config.folder / "summary.json").write_text(json.dumps({"status": status}))

    with StopRequests() as stop:
        for step in range(first, steps):
            if stop.received:
                end("stopped")
                return EXIT_STOPPED
            if step == 1 and config.trouble == "diverges":
                write(2, None)
                end("stopped")
                return 1
            if step == 1 and config.trouble == "fails":
                raise RuntimeError("the disk is full")
            write(step + 1, 1 / (step + 1))
            while step == 0 == first and config.trouble == "waits" and not stop.received:
                time.sleep(0.01)
            while config.trouble == "hangs":
                time.sleep(1)
        end("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
