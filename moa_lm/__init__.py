"""Language models: Llama and LlamaMoE with any FFN of the family, as transformers models.

Importing this package registers model_type `moa_llama` with transformers' AutoConfig, AutoModel and
AutoModelForCausalLM.
"""

from __future__ import annotations

from moa_startup.extras import require

require("moa_lm", "lm", "transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moa_lm.configuration import MoALlamaConfig
from moa_lm.modeling import MoALlamaForCausalLM, MoALlamaModel
from moa_lm.sizes import SIZES, named_config

__all__ = ["SIZES", "MoALlamaConfig", "MoALlamaForCausalLM", "MoALlamaModel", "named_config"]

AutoConfig.register(MoALlamaConfig.model_type, MoALlamaConfig, exist_ok=True)
AutoModel.register(MoALlamaConfig, MoALlamaModel, exist_ok=True)
AutoModelForCausalLM.register(MoALlamaConfig, MoALlamaForCausalLM, exist_ok=True)
