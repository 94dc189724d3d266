"""Floating-point operations of the forward pass of a language model, from its configuration."""

from __future__ import annotations

import torch
from torch import nn

from moa_lm.configuration import MoALlamaConfig
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.moe import Experts
from moa_lm.router import TopKRouter


def forward_flops(config: MoALlamaConfig, sequence_length: int) -> int:
    """Return the FLOPs of the forward pass of one sequence, matrix products only; a multiply-add is two FLOPs.

    The count is 2 T per entry of the matrices that a token passes (projections, mixing vectors, routers, k routed and
    the shared experts, head) plus 4 T^2 per layer and dimension of the heads for attention, masked pairs included, as
    in PaLM (arXiv:2204.02311, appendix B). Elementwise work, norms, softmaxes and embedding look-ups are left out.

    Args:
        config: Configuration of the model, which is built without storage.
        sequence_length: T.
    """
    with torch.device("meta"):
        model = MoALlamaForCausalLM(config)
    entries = sum(_entries(module, config) for module in model.modules())
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim
    return 2 * sequence_length * entries + 4 * sequence_length**2 * attention


def _entries(module: nn.Module, config: MoALlamaConfig) -> int:
    """Return the number of entries of the module's own matrices that a token is multiplied with."""
    if isinstance(module, nn.Linear | TopKRouter):
        return module.weight.numel()
    if not isinstance(module, Experts):
        return 0
    matrices = [module.gate_proj, module.up_proj, module.down_proj, module.mix_proj]
    # Stacks with one matrix per expert have three dimensions, a mixing matrix of the whole layer two.
    return sum(
        matrix.numel() * config.num_experts_per_tok // config.num_experts if matrix.ndim == 3 else matrix.numel()
        for matrix in matrices
        if matrix is not None
    )
