"""Evaluate trained encoders: k nearest neighbours, linear probe, fine-tuning.

    python scripts/probe.py RUN                                                 k nearest neighbours
    python scripts/probe.py RUN RUN --method knn linear --train SHARDS --val SHARDS
    python scripts/probe.py runs/SWEEP                                          all finished runs of a sweep
    accelerate launch scripts/probe.py RUN --method finetune --config configs/probe/imagenet_vit_b16.yaml
    python scripts/probe.py --help                                              all keys

RUN is the folder of a finished run, an export folder or the folder of a sweep. Results are written to RUN/probe, where
reports find them.
Exit codes: 0 finished, 1 failed, 2 invalid configuration or data, 75 stopped and saved (the same command resumes).
"""

import sys

from moa_vision.probe.command import main

if __name__ == "__main__":
    sys.exit(main())
