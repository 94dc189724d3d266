"""lm-eval's command line with the model "moa" registered: `python -m moa_eval --model moa --model_args ...`.

Takes the arguments of `lm_eval` and works under `accelerate launch -m moa_eval`, without the package's start-up line.
"""

from __future__ import annotations

import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does only in an empty registry
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

TARGET = "moa_eval.harness:MoALM"
"""Imported when the model is first used, so that --help does not import torch."""


def main() -> None:
    """Register the model and run lm-eval's command line."""
    if "moa" not in model_registry:
        model_registry.register("moa", target=TARGET)
    cli_evaluate()


if __name__ == "__main__":
    main()
