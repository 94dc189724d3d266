"""Run every combination of configs, values and seeds, and report on them.

    python scripts/sweep.py --config configs/mae/laptop_{swiglu,qdmoa}.yaml \\
        --set optim.lr=3e-4,6e-4,1.2e-3,2.4e-3 --seeds 3
    python scripts/sweep.py --help

Exit codes: 0 all runs are done, 1 a run or the report failed, 2 wrong configuration, 75 stopped and saved (the same
command continues).
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from task_kind import LANGUAGE, VISION, training_script

from moa_train.config import RESUME_MUTABLE_KEYS
from moa_train.sweep.command import main


def script_of(arguments: Sequence[str]) -> Path:
    """Return the script that trains the first configuration file named, or vision's where none tells.

    Files that cannot be read are left to the sweep's own check, which names them.
    """
    paths = [Path(argument.removeprefix("--config=")) for argument in arguments]
    first = next((path for path in paths if path.suffix in (".yaml", ".yml") and path.is_file()), None)
    with contextlib.suppress(ValueError):
        return training_script([first] if first else [])
    return VISION


def mutable_keys(script: Path) -> frozenset[str]:
    """Return the keys that may change when a run of the script is resumed."""
    if script == LANGUAGE:  # imported here, so that --help need not wait for it
        from moa_lm.pretrain import LM_RESUME_MUTABLE_KEYS

        return RESUME_MUTABLE_KEYS | LM_RESUME_MUTABLE_KEYS
    from moa_vision.pretrain import DATA_RESUME_MUTABLE_KEYS

    return RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS


if __name__ == "__main__":
    report = [sys.executable, str(VISION.with_name("compare_runs.py"))]
    script = script_of(sys.argv[1:])
    sys.exit(main(sys.argv[1:], script=script, report=report, mutable_keys=partial(mutable_keys, script)))
