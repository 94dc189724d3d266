"""MoE's parameters: names, shapes, counts, initialization, and the settings that are refused."""

import pytest
import torch
from torch import nn

from moa_lm.configuration import MoALlamaConfig
from moa_lm.moe import MoE


def configure(**fields) -> MoALlamaConfig:
    sizes = {"hidden_size": 12, "num_attention_heads": 1, "num_experts": 6, "num_experts_per_tok": 3}
    return MoALlamaConfig(**{**sizes, "moe_intermediate_size": 20, **fields})


@pytest.mark.parametrize("variant", ["relu2", "qdmoa", "bila"])
def test_initialization(variant):
    fields = {"num_experts": 40, "hidden_size": 60, "moe_intermediate_size": 50, "initializer_range": 0.03}
    mixing = {"ffn_mix_init_std": 0.1, "ffn_coef_init": 0.25, "mlp_bias": True, "ffn_mix_bias": True}
    with torch.device("meta"):
        moe = MoE(configure(ffn_variant=variant, expert_mixing="expert", **fields, **mixing))
    assert all(parameter.is_meta for parameter in moe.parameters())
    moe.to_empty(device="cpu")
    for parameter in moe.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    moe.init_weights()
    for name, parameter in moe.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("mix_coef"):
            assert (parameter == 0.25).all(), name
        else:
            std = 0.1 if "mix_proj" in name else 0.03
            assert abs(parameter.mean().item()) < std / 5, name
            assert parameter.std().item() == pytest.approx(std, rel=0.15), name


def test_parameters_are_counted_as_the_default_mixing_promises():
    def count(**fields) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in MoE(configure(num_shared_experts=0, **fields)).parameters())

    size = {"num_experts": 32, "hidden_size": 768, "moe_intermediate_size": 96}
    baseline = count(ffn_variant="swiglu", **size)
    assert baseline == 32 * 768 + 32 * 3 * 768 * 96
    assert count(ffn_variant="qdmoa", **size) - baseline == 6 * 768
    assert count(ffn_variant="qdmoa", expert_mixing="expert", **size) - baseline == 32 * 6 * 768
    assert count(ffn_variant="qdla", expert_mixing="expert", **size) - baseline == 32 * 6


def test_names_in_the_state_dict():
    names = set(MoE(configure(ffn_variant="qdmoa", mlp_bias=True, ffn_mix_bias=True)).state_dict())
    routed = {f"experts.{p}_proj{end}" for p in ("gate", "up", "down", "mix") for end in ("", "_bias")}
    shared = {f"shared_experts.{p}_proj.{end}" for p in ("gate", "up", "down", "mix") for end in ("weight", "bias")}
    assert names == {"router.weight"} | routed | shared


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_dispatch": "sorted"}, "expert_dispatch='sorted'.*auto, blocks, grouped, loop"),
        ({"expert_mixing": "token"}, "expert_mixing='token'.*layer.*expert"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7.*num_experts=6"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size=None"),
    ],
    ids=lambda value: min(value) if isinstance(value, dict) else "",
)
def test_bad_settings(fields, message):
    config = configure()
    for name, value in fields.items():  # past the configuration's own checks
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        MoE(config)
