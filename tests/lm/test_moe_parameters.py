"""MoE's parameters: names, shapes, counts, initialization, and the settings that are refused."""

import torch

from moa_lm.configuration import MoALlamaConfig
from moa_lm.moe import MoE


def configure(**fields) -> MoALlamaConfig:
    sizes = {"hidden_size": 12, "num_attention_heads": 1, "num_experts": 6, "num_experts_per_tok": 3}
    return MoALlamaConfig(**{**sizes, "moe_intermediate_size": 20, **fields})


def test_layer_mixing_adds_no_parameters_per_expert():
    def count(**fields) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in MoE(configure(num_shared_experts=0, **fields)).parameters())

    size = {"num_experts": 32, "hidden_size": 768, "moe_intermediate_size": 96}
    baseline = count(ffn_variant="swiglu", **size)
    assert baseline == 32 * 768 + 32 * 3 * 768 * 96
    assert count(ffn_variant="qdmoa", **size) - baseline == 6 * 768
    assert count(ffn_variant="qdmoa", expert_mixing="expert", **size) - baseline == 32 * 6 * 768
    assert count(ffn_variant="qdla", expert_mixing="expert", **size) - baseline == 32 * 6


def test_state_dict_names():
    names = set(MoE(configure(ffn_variant="qdmoa", mlp_bias=True, ffn_mix_bias=True)).state_dict())
    routed = {f"experts.{p}_proj{end}" for p in ("gate", "up", "down", "mix") for end in ("", "_bias")}
    shared = {f"shared_experts.{p}_proj.{end}" for p in ("gate", "up", "down", "mix") for end in ("weight", "bias")}
    assert names == {"router.weight"} | routed | shared
