"""lm-eval's model "moa": scores any causal language model and computes shared prefixes once."""

from __future__ import annotations

from moa_startup.extras import require

require("moa_eval.harness", "eval", "lm_eval", "transformers")

from moa_eval.harness.loading import ModelError
from moa_eval.harness.model import HFLM, MoALM

__all__ = ["HFLM", "MoALM", "ModelError"]
