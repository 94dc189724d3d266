"""Named sizes: parameter counts by hand, by transformers, and in the paper."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moa_lm import SIZES, named_config
from moa_lm.sizes import TABLE_VARIANTS, count_parameters
from moa_train.errors import ConfigError

VOCAB = 50304
SIX = "g,s,r,r2,l,t"
# Vectors of mixing coefficients with the default dictionaries of 3 and 2 activations.
VECTORS = {"swiglu": 0, "onemoa": 3, "bimoa": 5, "qdmoa": 6, "relu2": 0, "moa": 3}
ACTIVE = {"swiglu": 3, "onemoa": 3, "bimoa": 3, "qdmoa": 3, "relu2": 2, "moa": 2}  # matrices of an FFN


def by_hand(size: str, variant: str) -> tuple[int, int]:
    """Total and active parameters from the shape."""
    shape = SIZES[size]
    d, hidden = shape.width, shape.hidden if ACTIVE[variant] == 3 else shape.hidden * 3 // 2
    ffn, mixing = ACTIVE[variant] * d * hidden, VECTORS[variant] * d
    embeddings = VOCAB * d * (1 if shape.tied else 2) + d
    layer = 4 * d * d + 2 * d
    if not shape.experts:
        total = embeddings + shape.layers * (layer + ffn + mixing)
        return total, total
    layer += shape.experts * d + ffn + mixing  # router, shared expert with its mixing
    routed = [count * ffn + mixing for count in (shape.experts, shape.active_experts)]
    total, active = (embeddings + shape.layers * (layer + experts) for experts in routed)
    return total, active


@pytest.mark.parametrize("variant", TABLE_VARIANTS)
@pytest.mark.parametrize("size", [size for size in SIZES if size != "llama-large"])
def test_counts_by_hand(size, variant):
    count = count_parameters(named_config(size, variant))
    assert (count.total, count.active) == by_hand(size, variant)
    assert (
        count.mixing == count.total - by_hand(size, "swiglu" if variant in ("onemoa", "bimoa", "qdmoa") else "relu2")[0]
    )
    embeddings = VOCAB * SIZES[size].width * (1 if SIZES[size].tied else 2)
    assert count.non_embedding == count.total - embeddings


def test_baseline_count_equals_transformers():
    config = named_config("dense-0.12b", "swiglu")
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            LlamaConfig(**{k: v for k, v in config.to_dict().items() if k in LlamaConfig().to_dict()})
        )
    assert count_parameters(config).total == sum(p.numel() for p in theirs.parameters())


def test_counts_match_the_paper():
    """0.11974B, and 0.11980B for Llama-large and bi-MoA with six activations on each branch."""
    six = {"ffn_gate_activations": SIX, "ffn_up_activations": SIX}
    assert f"{count_parameters(named_config('dense-0.12b', 'swiglu')).total / 1e9:.5f}" == "0.11974"
    bimoa = count_parameters(named_config("dense-0.12b", "bimoa", **six)).total
    large = count_parameters(named_config("llama-large", "swiglu", **six)).total
    assert f"{bimoa / 1e9:.5f}" == f"{large / 1e9:.5f}" == "0.11980"
    assert bimoa == large


def test_experts_match_the_paper():
    small, large = (count_parameters(named_config(size, "swiglu")) for size in ("moe-0.25b", "moe-2b"))
    assert [f"{small.total / 1e9:.2f}", f"{small.active / 1e9:.2f}"] == ["0.25", "0.11"]
    assert [f"{large.total / 1e9:.0f}", f"{large.active / 1e9:.2f}"] == ["2", "0.62"]
    for size, shape in SIZES.items():
        if shape.experts and size not in ("moe-micro", "moe-tiny"):
            config = named_config(size)
            assert (config.num_experts, config.num_experts_per_tok, config.num_shared_experts) == (32, 4, 1)


def test_llama_large_matches_bimoa_up_to_a_hidden_unit():
    bimoa, large = named_config("dense-0.12b", "bimoa"), named_config("llama-large", "swiglu")
    unit = 3 * 768 * 6
    assert abs(count_parameters(large).total - count_parameters(bimoa).total) <= unit / 2
    with pytest.raises(ConfigError, match="ffn is 'qdmoa'; it must be swiglu for size llama-large"):
        named_config("llama-large", "qdmoa")


def test_unknown_size_variant_or_field():
    with pytest.raises(ConfigError, match=r"size is 'dense-7b'; it must be one of dense-nano, dense-micro, dense-tiny"):
        named_config("dense-7b")
    with pytest.raises(ConfigError, match="ffn is 'mish'; it must be one of"):
        named_config("dense-0.12b", "mish")
    with pytest.raises(ConfigError, match="ffn_gates is 'tanh'; it must be a field of"):
        named_config("dense-0.12b", "qdmoa", ffn_gates="tanh")
