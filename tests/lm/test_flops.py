"""FLOPs from the configuration against torch's counter on the running model, and saved activations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel  # torch 2.11's counter knows no other kernel on CPUs
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import VARIANTS
from moa_lm import MoALlamaForCausalLM
from moa_lm.flops import forward_flops
from moa_lm.workload import saved_bytes

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "expert_dispatch": "loop"}


def counted(model: MoALlamaForCausalLM, input_ids: torch.Tensor) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids, use_cache=False)
    rotary = [sum(of.values()) for name, of in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(rotary)  # a product with the positions before transformers 5.24


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_models(variant, tiny, tokens):
    model = tiny(ffn_variant=variant)
    assert forward_flops(model.config, 24) == counted(model, tokens(1, 24))


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 20},
        {**EXPERTS, "ffn_variant": "bila", "expert_mixing": "expert"},
        {"attention_bias": True, "mlp_bias": True, "ffn_mix_bias": True},
        {**EXPERTS, "num_shared_experts": 0},
        {**EXPERTS, "num_shared_experts": 2, "num_experts_per_tok": 5},
    ],
    ids=["wide heads", "own mixing", "biased", "no shared expert", "two shared experts"],
)
def test_other_shapes(fields, tiny, tokens):
    model = tiny(**fields)
    assert forward_flops(model.config, 17) == counted(model, tokens(1, 17))


def test_checkpointed_layers_save_their_inputs_only(tiny):
    configs = [tiny(num_hidden_layers=layers).config for layers in (2, 6)]
    short, long = (saved_bytes(config, 16, bf16=False, checkpointed=True).per_sample for config in configs)
    assert long - short == 4 * (4 * 16 * 32)  # four layers of 16 float32 vectors of width 32
