"""lm-eval's command line with the model "moa" registered: `python -m moa_eval --model moa --model_args ...`.

Takes the arguments of `lm_eval` and needs no start-up hook. Works under `accelerate launch -m moa_eval` too.
"""

import lm_eval.models  # noqa: F401  its own models first: it fills the registry only if that is empty
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

TARGET = "moa_eval.harness:MoALM"  # resolved when it is asked for: --help needs no torch


def main() -> None:
    """Register the model and run lm-eval's command line."""
    if "moa" not in model_registry:
        model_registry.register("moa", target=TARGET)
    cli_evaluate()


if __name__ == "__main__":
    main()
