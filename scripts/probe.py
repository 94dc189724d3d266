"""Tell what a trained encoder is worth: k nearest neighbours, a linear probe, fine-tuning.

    python scripts/probe.py RUN                                                 k nearest neighbours
    python scripts/probe.py RUN --method knn linear --train SHARDS --val SHARDS
    accelerate launch scripts/probe.py RUN --method finetune --config configs/probe/imagenet_vit_b16.yaml
    python scripts/probe.py --help                                              every key

RUN is a finished run's folder or an export folder; results go to RUN/probe, from where reports take them.
Exit codes: 0 finished, 1 failed, 2 wrong configuration, 75 stopped and saved (the same command continues).
"""

import sys

from moa_vision.probe.command import main

if __name__ == "__main__":
    sys.exit(main())
