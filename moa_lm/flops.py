"""Floating-point operations of a language model's forward pass, from its configuration."""

import torch
from torch import nn

from moa_lm.configuration import MoALlamaConfig
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.moe import Experts, TopKRouter


def forward_flops(config: MoALlamaConfig, sequence_length: int) -> int:
    """Floating-point operations of one sequence's forward pass (a multiply-add is two), matrix products only.

    2 T for each entry of the matrices that a token passes: projections, mixing vectors, routers, its k routed and the
    shared experts, and the head. Attention takes 4 T^2 a layer for each of the heads' dimensions, all T^2 pairs
    counted although half are masked, as in PaLM (arXiv:2204.02311, appendix B). The mixture's elementwise work,
    norms, softmaxes and the embedding's look-up are left out.

    Args:
        config: of the model; nothing is computed, the model is built without storage.
        sequence_length: T.
    """
    with torch.device("meta"):
        model = MoALlamaForCausalLM(config)
    entries = sum(_entries(module, config) for module in model.modules())
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim
    return 2 * sequence_length * entries + 4 * sequence_length**2 * attention


def _entries(module: nn.Module, config: MoALlamaConfig) -> int:
    """Entries of the module's own matrices that a token is multiplied with."""
    if isinstance(module, nn.Linear | TopKRouter):
        return module.weight.numel()
    if not isinstance(module, Experts):
        return 0
    matrices = [module.gate_proj, module.up_proj, module.down_proj, module.mix_proj]
    # Stacks of one matrix an expert have three dimensions; a mixing matrix of the whole layer has two.
    return sum(
        matrix.numel() * config.num_experts_per_tok // config.num_experts if matrix.ndim == 3 else matrix.numel()
        for matrix in matrices
        if matrix is not None
    )
