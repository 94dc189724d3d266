"""Pre-train a language model.

    python scripts/pretrain_lm.py                                   the laptop config, on tales that come with it
    accelerate launch scripts/pretrain_lm.py --config FILE          any config, on any number of devices
    python scripts/pretrain_lm.py --help                            all keys

Exit codes: 0 finished, 1 failed, 2 wrong config or data, 75 stopped and saved (the same command continues).
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from moa_eval.evaluator import lm_eval_evaluator
from moa_lm.pretrain import main

EVALUATORS = {"lm_eval": lm_eval_evaluator}

if __name__ == "__main__":
    default = Path(__file__).parents[1] / "configs/lm/tales_qdmoa.yaml"
    sys.exit(record(main)(default=default, evaluators=EVALUATORS))
