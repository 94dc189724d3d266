"""FLOPs from the configuration against torch's counter on the running model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel  # torch 2.11's counter knows no other kernel on CPUs
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import VARIANTS
from moa_lm import MoALlamaForCausalLM
from moa_lm.flops import forward_flops

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "expert_dispatch": "loop"}


def counted(model: MoALlamaForCausalLM, input_ids: torch.Tensor) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids, use_cache=False)
    rotary = [sum(of.values()) for name, of in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(rotary)  # a product with the positions before transformers 5.24


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_models(variant, attention, tiny, tokens):
    model = tiny(ffn_variant=variant, attn_implementation=attention)
    assert forward_flops(model.config, 24) == counted(model, tokens(1, 24))


@pytest.mark.parametrize("mixing", ["layer", "expert"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_active_experts_are_counted(variant, mixing, tiny, tokens):
    model = tiny(ffn_variant=variant, expert_mixing=mixing, **EXPERTS)
    assert forward_flops(model.config, 24) == counted(model, tokens(1, 24))


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 20},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "ffn_mix_bias": True},
        {"num_key_value_heads": 1, "num_hidden_layers": 3},
        {**EXPERTS, "num_shared_experts": 0},
        {**EXPERTS, "num_shared_experts": 2, "num_experts_per_tok": 5},
    ],
    ids=["wide heads", "tied", "biased", "one key head", "no shared expert", "two shared experts"],
)
def test_other_shapes(fields, tiny, tokens):
    model = tiny(**fields)
    assert forward_flops(model.config, 17) == counted(model, tokens(1, 17))


def test_flops_are_linear_in_the_batch(tiny, tokens):
    model = tiny(**EXPERTS)
    assert 3 * forward_flops(model.config, 8) == counted(model, tokens(3, 8))
