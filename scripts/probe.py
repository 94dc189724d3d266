"""Tell what a trained encoder is worth: k nearest neighbours, a linear probe, fine-tuning.

    python scripts/probe.py RUN                                                 k nearest neighbours
    python scripts/probe.py RUN RUN --method knn linear --train SHARDS --val SHARDS
    python scripts/probe.py runs/SWEEP                                          all finished runs of a sweep
    accelerate launch scripts/probe.py RUN --method finetune --config configs/probe/imagenet_vit_b16.yaml
    python scripts/probe.py --help                                              every key

RUN is a finished run's folder, an export folder or a sweep's folder; results go to
each run's folder probe, from where reports take them.
Exit codes: 0 finished, 1 failed, 2 wrong configuration, 75 stopped and saved (the same command continues).
"""

import sys

from moa_vision.probe.command import main

if __name__ == "__main__":
    sys.exit(main())
