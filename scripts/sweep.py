"""Train every combination of configs, values and seeds, and report on them.

    python scripts/sweep.py --config configs/mae/laptop_{swiglu,qdmoa}.yaml \\
        --set optim.lr=3e-4,6e-4,1.2e-3,2.4e-3 --seeds 3
    python scripts/sweep.py --help

Exit codes: 0 all runs are done or submitted, 1 a run or the report failed, 2 wrong configuration, 75 stopped (the
same command continues).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from task_kind import HERE, LANGUAGE, training_script

from moa_train.config import RESUME_MUTABLE_KEYS
from moa_train.sweep.cli import main
from moa_train.sweep.grid import Trainer


def find_trainer(files: Sequence[Path]) -> Trainer:
    """Return the training script of config files."""
    script = training_script(files)
    if script == LANGUAGE:  # imported late, since either half may be absent
        from pretrain_lm import EVALUATORS

        from moa_lm.pretrain import LM_RESUME_MUTABLE_KEYS
        from moa_lm.pretrain import main as train

        return Trainer(script, partial(train, evaluators=EVALUATORS), RESUME_MUTABLE_KEYS | LM_RESUME_MUTABLE_KEYS)
    from pretrain_mae import EVALUATORS

    from moa_vision.pretrain import DATA_RESUME_MUTABLE_KEYS
    from moa_vision.pretrain import main as train

    return Trainer(script, partial(train, evaluators=EVALUATORS), RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS)


if __name__ == "__main__":
    report = [sys.executable, str(HERE / "compare_runs.py")]
    sys.exit(main(sys.argv[1:], find_trainer=find_trainer, report=report))
