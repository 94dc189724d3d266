"""Pre-train a masked autoencoder.

    python scripts/pretrain_mae.py                                  the laptop config, on photographs
    accelerate launch scripts/pretrain_mae.py --config FILE         any other, on any number of devices
    python scripts/pretrain_mae.py --help                           every key

Exit codes: 0 finished, 1 failed, 2 wrong configuration, 75 stopped and saved (the same command continues).
"""

import sys
from pathlib import Path

from moa_vision.pretrain import main

if __name__ == "__main__":
    sys.exit(main(default=Path(__file__).parents[1] / "configs/mae/laptop_qdmoa.yaml"))
