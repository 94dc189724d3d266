"""Estimate memory, hours, loader cores and checkpoint size of a run on target hardware.

    python scripts/plan.py --config configs/mae/vit_b16_qdmoa_800ep.yaml --gpu h200 --gpus 1,8,64
    python scripts/plan.py --config configs/lm/moe_2b_qdmoa.yaml --gpu h100 --gpus 64 --parallel fsdp2
    python scripts/plan.py --help

Neither data nor weights are needed. docs/planning.md has the formulas and their limits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from task_kind import VISION, training_script

from moa_train.config import parse_config
from moa_train.devices import find_gpu
from moa_train.errors import ConfigError, DataError
from moa_train.estimate import Target, assumed_rate, measured_rate
from moa_train.plan_cli import build_parser, print_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of a command line; return the exit code."""
    options, keys = build_parser().parse_known_args(arguments)
    words = [*(f"--config={file}" for file in options.config), *keys]
    try:
        script = training_script(options.config)
        if script == VISION:  # imported late, since either half may be absent
            from moa_vision.pretrain import MAEConfig
            from moa_vision.workload import mae_workload, recorded_muon

            config = parse_config(MAEConfig, words, program=script.name, summary="")
            make_workload = partial(mae_workload, config, images=options.images, decode_rate=options.decode_rate)
        else:
            from moa_lm.pretrain import LMConfig
            from moa_lm.workload import lm_workload, recorded_muon

            config = parse_config(LMConfig, words, program=script.name, summary="")
            make_workload = partial(lm_workload, config, tokens=options.tokens)
        gpu = find_gpu(options.gpu)
        if options.measured:
            shapes = recorded_muon(options.measured)
            rate, source = measured_rate(options.measured, gpu, shapes, options.parallel)
        else:
            rate, source = assumed_rate(gpu, options.utilization)
        target = Target(gpu, rate, source, options.parallel)
        print_plan(config, make_workload(), target, options.gpus)
    except (ConfigError, DataError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
