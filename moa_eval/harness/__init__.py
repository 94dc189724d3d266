"""lm-eval's model "moa": any causal language model, scored with everything that requests share computed once."""

from moa_startup.extras import require

require("moa_eval.harness", "eval", "lm_eval", "transformers")

from moa_eval.harness.loading import ModelError
from moa_eval.harness.model import HFLM, MoALM

__all__ = ["HFLM", "MoALM", "ModelError"]
