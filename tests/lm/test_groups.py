"""Parameter groups, compared with the modules that own the parameters."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from moa_ffn import FFN, VARIANTS
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM
from moa_lm.groups import hidden_matrices, no_weight_decay
from moa_lm.moe import Experts
from moa_lm.router import TopKRouter
from moa_train.config import OptimConfig
from moa_train.muon import StackedMuon
from moa_train.optim import build_optimizer, describe_groups

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 6}
FEEDFORWARD = {
    "dense": {},
    "layer": {**EXPERTS, "expert_mixing": "layer"},
    "expert": {**EXPERTS, "expert_mixing": "expert"},
}


def build(**fields):
    torch.manual_seed(0)
    return MoALlamaForCausalLM(MoALlamaConfig(**{**SIZES, **fields}))


def by_module(model):
    """Ids of (hidden matrices, vectors, other weights), found by the type of their modules."""
    hidden, vectors, others = set(), set(), set()
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            hidden |= {id(child.weight) for child in module.children() if isinstance(child, nn.Linear)}
        elif isinstance(module, FFN | Experts):
            projections = [module.gate_proj, module.up_proj, module.down_proj]
            hidden |= {id(getattr(p, "weight", p)) for p in projections if p is not None}
            vectors |= {id(module.mix_coef)} - {id(None)}
            mix = module.mix_proj
            others |= {id(getattr(mix, "weight", mix))} - {id(None)}
        elif isinstance(module, TopKRouter | nn.Embedding):
            others.add(id(module.weight))
        elif isinstance(module, LlamaRMSNorm):
            vectors.add(id(module.weight))
        biases = {id(p) for name, p in module.named_parameters(recurse=False) if name.rpartition("_")[2] == "bias"}
        vectors |= biases
    others.add(id(model.lm_head.weight))
    return hidden, vectors, others


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("feedforward", FEEDFORWARD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_classified_once(variant, feedforward, bias):
    biases = {"mlp_bias": bias, "attention_bias": bias, "ffn_mix_bias": bias and "moa" in variant}
    model = build(ffn_variant=variant, **FEEDFORWARD[feedforward], **biases)
    named = dict(model.named_parameters())
    hidden, vectors, others = by_module(model)
    assert sorted([*hidden, *vectors, *others]) == sorted(map(id, named.values()))
    assert {id(named[name]) for name in hidden_matrices(model)} == hidden
    assert {id(named[name]) for name in no_weight_decay(model)} == vectors
    assert {named[name].ndim for name in hidden_matrices(model)} == ({2} if feedforward == "dense" else {2, 3})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_muon_steps_a_model_with_experts(tied):
    model = build(ffn_variant="qdmoa", tie_word_embeddings=tied, **FEEDFORWARD["layer"])
    config = OptimConfig(algorithm="muon", weight_decay=0.1)
    optimizer = build_optimizer(model, config, no_weight_decay(model), hidden_matrices(model))
    embeddings = 50 * 8 * (1 if tied else 2)
    # Router 4 x 8, mixing 6 x 8 of routed and of shared experts, a layer; attention 2 x 8 x 8 and 2 x 8 x 4.
    assert describe_groups(optimizer) == (
        f"Muon: 14 tensors ({2 * (192 + 3 * 48):,}) with weight decay 0.1; "
        f"StackedMuon: 6 tensors ({2 * 3 * 4 * 48:,}) with weight decay 0.1; "
        f"AdamW: {7 if tied else 8} tensors ({embeddings + 2 * (32 + 48 + 48):,}) with weight decay 0.1; "
        "AdamW: 5 tensors (40) with weight decay 0"
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.arange(48).view(2, 24)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all((before[name] != parameter).any() for name, parameter in model.named_parameters())
    stacks = [group["params"] for o in optimizer.optimizers if isinstance(o, StackedMuon) for group in o.param_groups]
    assert [stack.shape[0] for part in stacks for stack in part] == [4] * 6


def test_wrapped_and_frozen_models():
    model = build(ffn_variant="la", attention_bias=True)
    wrapped = nn.ModuleDict({"inner": model})
    assert hidden_matrices(wrapped) == {f"inner.{name}" for name in hidden_matrices(model)}
    assert no_weight_decay(wrapped) == {f"inner.{name}" for name in no_weight_decay(model)}
    everything = hidden_matrices(model) | no_weight_decay(model)
    model.model.layers[0].requires_grad_(False)
    left = hidden_matrices(model) | no_weight_decay(model)
    assert left == {name for name in everything if not name.startswith("model.layers.0.")} and left
    build_optimizer(model, OptimConfig(algorithm="muon"), no_weight_decay(model), hidden_matrices(model))
