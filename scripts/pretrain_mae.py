"""Pre-train a masked autoencoder.

    python scripts/pretrain_mae.py                                  the laptop config, on photographs
    accelerate launch scripts/pretrain_mae.py --config FILE         any config, on any number of devices
    python scripts/pretrain_mae.py --help                           all keys

Exit codes: 0 finished, 1 failed, 2 wrong config or data, 75 stopped and saved (the same command continues).
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from moa_vision.pretrain import main
from moa_vision.probe.evaluator import knn_evaluator

EVALUATORS = {"knn": knn_evaluator}

if __name__ == "__main__":
    default = Path(__file__).parents[1] / "configs/mae/laptop_qdmoa.yaml"
    sys.exit(record(main)(default=default, evaluators=EVALUATORS))
