"""Parameter groups of models with experts."""

import pytest
from torch import nn

from moa_lm import MoALlamaConfig, MoALlamaForCausalLM
from moa_lm.groups import hidden_matrices, no_weight_decay

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "mlp_bias": True,
    "attention_bias": True,
}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}


@pytest.mark.parametrize("mixing", ["layer", "expert"])
@pytest.mark.parametrize(
    ("variant", "decayed", "vectors"), [("qdmoa", {"mix_proj"}, set()), ("bila", set(), {"mix_coef"})]
)
def test_every_parameter_is_in_one_group(variant, decayed, vectors, mixing):
    config = MoALlamaConfig(**SIZES, ffn_variant=variant, expert_mixing=mixing)
    model = nn.ModuleDict({"inner": MoALlamaForCausalLM(config)})
    layer, attention, projections = "inner.model.layers.0.", "qkvo", ("gate_proj", "up_proj", "down_proj")
    hidden = {f"{layer}self_attn.{name}_proj.weight" for name in attention}
    hidden |= {f"{layer}mlp.shared_experts.{name}.weight" for name in projections}
    hidden |= {f"{layer}mlp.experts.{name}" for name in projections}
    assert hidden_matrices(model) == hidden
    plain = {"inner.model.norm.weight", *(layer + name for name in NORMS)}
    plain |= {f"{layer}self_attn.{name}_proj.bias" for name in attention}
    plain |= {f"{layer}mlp.shared_experts.{name}.bias" for name in projections}
    plain |= {f"{layer}mlp.experts.{name}_bias" for name in projections}
    plain |= {f"{layer}mlp.{part}.{name}" for part in ("experts", "shared_experts") for name in vectors}
    assert no_weight_decay(model) == plain
    others = {"inner.model.embed_tokens.weight", "inner.lm_head.weight", f"{layer}mlp.router.weight"}
    others |= {f"{layer}mlp.experts.{name}" for name in decayed}
    others |= {f"{layer}mlp.shared_experts.{name}.weight" for name in decayed}
    assert others == {name for name, _ in model.named_parameters()} - hidden - plain
    model.requires_grad_(False)
    assert hidden_matrices(model) == no_weight_decay(model) == set()
