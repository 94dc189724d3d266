"""Named sizes and their parameters, counted.

What the paper (arXiv:2605.26647) gives are names and a few counts, not shapes. dense-0.12b is more than a choice: 6
layers of width 768, hidden width 2048 and two 50,304 x 768 embeddings have 0.11974B parameters, the paper's figure
for its baseline; six activations on each branch of bi-MoA make it 0.11980B, its figure for bi-MoA; and a SwiGLU
four units wider has exactly as many, as its Llama-large. That is inferred from the counts, not stated there. All
other shapes are ours, chosen to meet the names and ranges.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moa_ffn import FFN, FFNSpec
from moa_lm.configuration import MoALlamaConfig
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.moe import Experts

VOCAB_SIZE = 50304
"""GPT-2's 50,257 tokens, padded to a multiple of 64."""
END_OF_TEXT = 50256
"""GPT-2's only special token."""

TABLE_VARIANTS = ("swiglu", "onemoa", "bimoa", "qdmoa", "relu2", "moa")
"""The variants that the paper compares: Type-II, then the Type-I pair."""


@dataclass(frozen=True)
class Size:
    """A shape, for Type-II FFNs; a Type-I FFN is 3/2 as wide, which keeps its parameter count.

    Args:
        layers, width, heads: num_hidden_layers, hidden_size, num_attention_heads.
        hidden: intermediate_size, or with experts the hidden width of one expert.
        experts: routed experts; 0 is dense.
        active_experts: routed experts of a token.
        tied: whether input and output embeddings are one matrix.
        variants: the variants it exists for; empty for all.
        widens: the size that it is but for wider FFNs, if any.
        paper_total, paper_active: the paper's figure in billions, as text, by variant; "" is for all others.
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
    paper_total: dict[str, str] = field(default_factory=dict)
    paper_active: dict[str, str] = field(default_factory=dict)


SIZES: dict[str, Size] = {
    "dense-micro": Size(4, 128, 2, 320, tied=True),
    "dense-tiny": Size(4, 256, 4, 640, tied=True),
    "dense-0.12b": Size(6, 768, 12, 2048, paper_total={"swiglu": "0.11974", "bimoa": "0.11980", "": "0.12"}),
    "llama-large": Size(6, 768, 12, 2048, variants=("swiglu",), widens="dense-0.12b", paper_total={"": "0.11980"}),
    "dense-0.25b": Size(12, 1024, 16, 2688, paper_total={"": "0.25"}),
    "dense-0.5b": Size(12, 1536, 24, 4096, paper_total={"": "0.5"}),
    "moe-micro": Size(4, 128, 2, 128, experts=8, active_experts=2, tied=True),
    "moe-tiny": Size(4, 256, 4, 192, experts=8, active_experts=2, tied=True),
    "moe-0.25b": Size(9, 704, 11, 256, experts=32, paper_total={"": "0.25"}, paper_active={"": "0.11"}),
    "moe-0.5b": Size(11, 896, 14, 384, experts=32),
    "moe-1b": Size(18, 1152, 18, 384, experts=32),
    "moe-2b": Size(19, 1664, 26, 512, experts=32, paper_total={"": "2"}, paper_active={"": "0.62"}),
}
"""The tiny and micro ones are for laptops and tests. All MoE sizes have one shared expert."""


def named_config(size: str, variant: str = "qdmoa", **overrides: Any) -> MoALlamaConfig:
    """The configuration of a named size with `variant` as its FFN.

    Without overrides it has GPT-2's vocabulary, padded to 50,304, and 2048 positions. `llama-large` is the SwiGLU
    model whose wider FFN has the parameters of dense-0.12b's bi-MoA, as near as whole hidden units allow.

    Args:
        size: a key of `SIZES`.
        variant: one of `moa_ffn.VARIANTS`.
        overrides: any field of `MoALlamaConfig`, such as vocab_size or ffn_mixing_gate.

    Raises:
        ValueError: the size or variant is unknown, or they do not go together, or a field is not allowed.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is not one of {', '.join(SIZES)}")
    shape = SIZES[size]
    if shape.variants and variant not in shape.variants:
        raise ValueError(f"variant={variant!r}: {size} exists for {', '.join(shape.variants)} only")
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
    config = MoALlamaConfig(**{**fields, "bos_token_id": end, "eos_token_id": end, **overrides})
    if shape.widens and "intermediate_size" not in overrides:
        config.intermediate_size += _units_of_bimoa(config)
    return config


def _units_of_bimoa(config: MoALlamaConfig) -> int:
    """Hidden units of a Type-II FFN that have as many parameters as bi-MoA's mixing, to the nearest."""
    spec = config.ffn_spec()
    bimoa = FFNSpec(
        "bimoa", gate_activations=spec.gate_activations, up_activations=spec.up_activations, mix_bias=spec.mix_bias
    )
    return round(bimoa.extra_parameters(config.hidden_size) / (3 * config.hidden_size))


class Parameters(NamedTuple):
    """Parameters of a model, counted.

    total: all, a tied matrix once.
    active: what one token passes: all but the routed experts that it is not sent to; embeddings are counted whole.
    non_embedding: total without input and output embeddings.
    mixing: what the mixture of activations adds, of `total`.
    """

    total: int
    active: int
    non_embedding: int
    mixing: int


def count_parameters(config: MoALlamaConfig) -> Parameters:
    """Exact counts, from the model itself, built without storage."""
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
    """Parameters of the routed experts that a token is not sent to; mixing of the whole layer is always used."""
    own = [p for name, p in experts.named_parameters() if experts.mixing == "expert" or not name.startswith("mix_")]
    return sum(p.numel() for p in own) * (experts.num_experts - chosen) // experts.num_experts
