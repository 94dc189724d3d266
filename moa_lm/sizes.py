"""Named sizes and their exact parameter counts.

The paper (arXiv:2605.26647) gives names and a few counts, not shapes. The shape of dense-0.12b is inferred: 6 layers
of width 768, hidden width 2048 and two 50,304 x 768 embeddings have 0.11974B parameters, the paper's figure for its
baseline; bi-MoA with six activations on each branch has 0.11980B, its figure for bi-MoA; a SwiGLU four units wider has
as many, as its Llama-large. All other shapes are this project's, chosen to match the names and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moa_ffn import FFN, VARIANTS, FFNSpec
from moa_lm.configuration import MoALlamaConfig, build_config
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.moe import Experts
from moa_train.errors import require

VOCAB_SIZE = 50304
"""GPT-2's 50,257 tokens, padded to a multiple of 64."""

END_OF_TEXT = 50256
"""GPT-2's only special token."""

TABLE_VARIANTS = ("swiglu", "onemoa", "bimoa", "qdmoa", "relu2", "moa")
"""Variants that the paper compares: Type-II, then the Type-I pair."""


@dataclass(frozen=True)
class Size:
    """Shape of a model with Type-II FFNs; Type-I FFNs are 3/2 as wide, for the same parameter count.

    Args:
        layers, width, heads: num_hidden_layers, hidden_size, num_attention_heads.
        hidden: intermediate_size, or with experts the hidden width of one expert.
        experts: Routed experts; 0 is dense.
        active_experts: Routed experts per token.
        tied: Whether input and output embeddings share one matrix.
        variants: Variants of this size; empty for all.
        widens: Size that differs from this one by narrower FFNs only, if any.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    experts: int = 0
    active_experts: int = 4
    tied: bool = False
    variants: tuple[str, ...] = ()
    widens: str = ""


SIZES: dict[str, Size] = {
    "dense-nano": Size(4, 96, 3, 256, tied=True),
    "dense-micro": Size(4, 128, 2, 320, tied=True),
    "dense-tiny": Size(4, 256, 4, 640, tied=True),
    "dense-0.12b": Size(6, 768, 12, 2048),
    "llama-large": Size(6, 768, 12, 2048, variants=("swiglu",), widens="dense-0.12b"),
    "dense-0.25b": Size(12, 1024, 16, 2688),
    "dense-0.5b": Size(12, 1536, 24, 4096),
    "moe-micro": Size(4, 128, 2, 128, experts=8, active_experts=2, tied=True),
    "moe-tiny": Size(4, 256, 4, 192, experts=8, active_experts=2, tied=True),
    "moe-0.25b": Size(9, 704, 11, 256, experts=32),
    "moe-0.5b": Size(11, 896, 14, 384, experts=32),
    "moe-1b": Size(18, 1152, 18, 384, experts=32),
    "moe-2b": Size(19, 1664, 26, 512, experts=32),
}
"""Sizes by name. Nano, micro and tiny sizes are for laptops and tests; all MoE sizes have one shared expert."""


def named_config(size: str, variant: str = "qdmoa", **overrides: Any) -> MoALlamaConfig:
    """Return the configuration of a named size with `variant` as its FFN.

    Without overrides it has GPT-2's vocabulary, padded to 50,304, and 2048 positions. `llama-large` is the SwiGLU
    model whose wider FFN has the parameters of dense-0.12b's bi-MoA, up to whole hidden units.

    Args:
        size: A key of `SIZES`.
        variant: One of `moa_ffn.VARIANTS`.
        overrides: Any field of `MoALlamaConfig`, such as vocab_size or ffn_mixing_gate.

    Raises:
        ConfigError: The size or variant is unknown, they do not fit each other, or a field is invalid.
    """
    require("size", size, size in SIZES, f"one of {', '.join(SIZES)}")
    require("ffn", variant, variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
    shape = SIZES[size]
    require("ffn", variant, variant in (shape.variants or VARIANTS), f"{', '.join(shape.variants)} for size {size}")
    hidden = shape.hidden if FFNSpec(variant).type_two else shape.hidden * 3 // 2
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.width,
        "intermediate_size": hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 2048,
        "ffn_variant": variant,
    }
    if shape.experts:
        fields |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.active_experts,
            "num_shared_experts": 1,
            "moe_intermediate_size": hidden,
        }
    end = END_OF_TEXT if "vocab_size" not in overrides else None
    config = build_config(**{**fields, "bos_token_id": end, "eos_token_id": end, **overrides})
    if shape.widens and "intermediate_size" not in overrides:
        config.intermediate_size += _units_of_bimoa(config)
    return config


def _units_of_bimoa(config: MoALlamaConfig) -> int:
    """Return the number of hidden units of a Type-II FFN with the parameters of bi-MoA's mixing, rounded."""
    spec = config.ffn_spec()
    bimoa = FFNSpec(
        "bimoa", gate_activations=spec.gate_activations, up_activations=spec.up_activations, mix_bias=spec.mix_bias
    )
    return round(bimoa.extra_parameters(config.hidden_size) / (3 * config.hidden_size))


def padded_vocab(tokens: int) -> int:
    """Return the vocabulary size of a model: that of the tokenizer, padded to a multiple of 64 for faster products."""
    return -(-tokens // 64) * 64


class Parameters(NamedTuple):
    """Parameter counts of a model.

    Attributes:
        total: All parameters, a tied matrix once.
        active: Parameters that process one token: all except those of unused routed experts, embeddings included.
        non_embedding: Total without input and output embeddings.
        mixing: Parameters of the mixture of activations.
    """

    total: int
    active: int
    non_embedding: int
    mixing: int


def count_parameters(config: MoALlamaConfig) -> Parameters:
    """Count the parameters of a model exactly; the model is built without storage."""
    with torch.device("meta"):
        model = MoALlamaForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {model.model.embed_tokens.weight, model.lm_head.weight}
    idle = mixing = 0
    for module in model.modules():
        if isinstance(module, FFN):
            mixing += module.mixing_parameters()
        elif isinstance(module, Experts):
            idle += _idle(module, config.num_experts_per_tok)
            mixing += sum(p.numel() for name, p in module.named_parameters() if name.startswith("mix_"))
    return Parameters(total, total - idle, total - sum(weight.numel() for weight in embeddings), mixing)


def _idle(experts: Experts, chosen: int) -> int:
    """Return the parameters of the routed experts that a token does not use; layer-wide mixing is always used."""
    own = [p for name, p in experts.named_parameters() if experts.mixing == "expert" or not name.startswith("mix_")]
    return sum(p.numel() for p in own) * (experts.num_experts - chosen) // experts.num_experts
