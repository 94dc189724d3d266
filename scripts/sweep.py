"""Run every combination of configs, values and seeds, and report on them.

    python scripts/sweep.py --config configs/mae/cifar10_vit_t_{swiglu,qdmoa}.yaml \\
        --set optim.lr=3e-4,6e-4,1.2e-3,2.4e-3 --seeds 3
    python scripts/sweep.py --help

Exit codes: 0 all runs are done, 1 a run or the report failed, 2 wrong configuration, 75 stopped and saved (the same
command continues).
"""

import sys
from pathlib import Path

from moa_train.config import HARMLESS
from moa_train.sweep.command import main

HERE = Path(__file__).resolve().parent


def harmless() -> frozenset[str]:
    """Return the keys that may change when a run is resumed."""
    from moa_vision.pretrain import DATA_HARMLESS  # here, so that --help need not wait for it

    return HARMLESS | DATA_HARMLESS


if __name__ == "__main__":
    report = [sys.executable, str(HERE / "compare_runs.py")]
    sys.exit(main(sys.argv[1:], script=HERE / "pretrain_mae.py", report=report, harmless=harmless))
