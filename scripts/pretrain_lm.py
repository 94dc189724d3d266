"""Pre-train a language model.

    python scripts/pretrain_lm.py                                   the laptop config, on tales that come with it
    accelerate launch scripts/pretrain_lm.py --config FILE          any other, on any number of devices
    python scripts/pretrain_lm.py --help                            every key

Exit codes: 0 finished, 1 failed, 2 wrong configuration, 75 stopped and saved (the same command continues).
"""

import sys
from pathlib import Path

from moa_lm.pretrain import main

if __name__ == "__main__":
    sys.exit(main(default=Path(__file__).parents[1] / "configs/lm/tales_qdmoa.yaml"))
