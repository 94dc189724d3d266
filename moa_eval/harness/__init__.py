"""lm-eval's model "moa": any causal language model, scored with everything that requests share computed once."""

from moa_eval.harness.model import HFLM, MoALM, ModelError

__all__ = ["HFLM", "MoALM", "ModelError"]
