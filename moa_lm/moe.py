"""LlamaMoE's feedforward layer: routed and shared experts, each an FFN of any variant of the family.

out(x) = sum over the chosen experts e of w_e(x) FFN_e(x), plus FFN_shared(x), with the routed and shared experts of
DeepSeekMoE (arXiv:2401.06066). The paper's LlamaMoE has 32 routed experts, 4 chosen, and 1 shared expert
(arXiv:2605.26647). No token is dropped, and the output of a token does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_ffn import FFN, init_mixing, mixture
from moa_lm.configuration import MoALlamaConfig
from moa_lm.dispatch import Groups, choose_method, compute_dtype, dispatch, group_by_expert, project_in, project_out
from moa_lm.router import TopKRouter


class Experts(nn.Module):
    """Routed experts: E FFNs of one variant with stacked weights.

    Parameters, for E experts, width D, hidden width H and K mixing coefficients (`FFNSpec.num_coefficients`); None if
    the variant or the configuration has none:
        gate_proj (E, H, D), up_proj (E, H, D), down_proj (E, D, H): `gate_proj[e]` is the weight of expert e's
        `FFN.gate_proj`. With `mlp_bias` also gate_proj_bias (E, H), up_proj_bias (E, H), down_proj_bias (E, D).
        mix_proj (K, D) or (E, K, D) of MoA variants, with `ffn_mix_bias` also mix_proj_bias (K,) or (E, K);
        mix_coef (K,) or (E, K) of LA variants: one per layer, or one per expert. act_param (P,) of trainable
        activations, one per layer.

    `expert_mixing` "layer", the default, adds O(d) parameters per layer and none per expert, as the paper's mixture:
    K vectors instead of E * K (with qdmoa, 32 experts and D = 768: 4,608 instead of 147,456 per layer). Coefficients
    take one dense product per token instead of k thin grouped ones, and all tokens train them. With "expert" each
    expert reads a token by its own vectors.

    Args:
        config: A configuration with experts.
    """

    def __init__(self, config: MoALlamaConfig) -> None:
        super().__init__()
        count, dim, hidden = config.num_experts, config.hidden_size, config.moe_intermediate_size
        assert hidden is not None, "checked by MoALlamaConfig"
        self.num_experts, self.dim, self.hidden_dim = count, dim, hidden
        self.mixing, self.method, self.backend = config.expert_mixing, config.expert_dispatch, config.ffn_backend
        self.init_std = config.initializer_range
        self.mix_init_std, self.coef_init = config.ffn_mix_init_std, config.ffn_coef_init
        self.spec = config.ffn_spec()
        k, spec = self.spec.num_coefficients, self.spec
        mixing = (count,) if self.mixing == "expert" else ()
        self._stack("gate_proj", (count, hidden, dim), bias=config.mlp_bias)
        self._stack("up_proj", (count, hidden, dim) if spec.type_two else None, bias=config.mlp_bias)
        self._stack("down_proj", (count, dim, hidden), bias=config.mlp_bias)
        self._stack("mix_proj", (*mixing, k, dim) if spec.token_adaptive else None, bias=spec.mix_bias)
        self.mix_coef = nn.Parameter(torch.empty(*mixing, k)) if spec.learned_constant else None
        parameters = spec.num_activation_parameters
        self.act_param = nn.Parameter(torch.empty(parameters)) if parameters else None
        self.init_weights()

    gate_proj: nn.Parameter
    down_proj: nn.Parameter
    up_proj: nn.Parameter | None
    mix_proj: nn.Parameter | None
    gate_proj_bias: nn.Parameter | None
    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    mix_proj_bias: nn.Parameter | None

    def _stack(self, name: str, shape: tuple[int, ...] | None, bias: bool) -> None:
        """Register weights (..., outputs, inputs) and biases (..., outputs), or None."""
        for label, size in ((name, shape), (f"{name}_bias", shape[:-1] if shape and bias else None)):
            self.register_parameter(label, None if size is None else nn.Parameter(torch.empty(size)))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize projections by normal(initializer_range), biases to zero, the mixing as `FFN.init_weights`."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("_proj") and name != "mix_proj":
                nn.init.normal_(parameter, std=self.init_std)
        mixing = (self.mix_proj, self.mix_coef, self.act_param)
        init_mixing(self.spec, *mixing, std=self.mix_init_std, coef=self.coef_init)

    def forward(self, hidden: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return the weighted sum (N, D) of each token's experts, in hidden's dtype or autocast's.

        Shapes are hidden (N, D), weights (N, k) in float32, and indices (N, k) of experts, int64.

        Raises:
            ConfigError: `expert_dispatch` names a method that is unavailable for this device or dtype.
        """
        hidden = hidden.to(compute_dtype(hidden))  # cast before rows are copied
        method = choose_method(self.method, hidden.device, hidden.dtype)
        groups = group_by_expert(indices, self.num_experts)
        maps = [(weight, bias) for weight, bias in self._maps() if weight is not None]
        projected = project_in(hidden, maps, groups, method)
        a, b = projected[0], None if self.up_proj is None else projected[1]
        mix = projected[-1] if self.mixing == "expert" and self.mix_proj is not None else self._mix(hidden, groups)
        mixed = mixture(a, b, mix, self.spec, self.backend, self.act_param)
        return project_out(mixed, self.down_proj, self.down_proj_bias, weights, groups, method)

    def _maps(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield weight and bias of the maps of an expert: gate, up, and mixing if every expert has its own."""
        yield self.gate_proj, self.gate_proj_bias
        yield self.up_proj, self.up_proj_bias
        if self.mixing == "expert":
            yield self.mix_proj, self.mix_proj_bias

    def _mix(self, hidden: Tensor, groups: Groups) -> Tensor | None:
        """Return mixing logits or constants (S, K) of all rows for tokens hidden (N, D); None for a fixed FFN."""
        if self.mix_proj is not None:
            return dispatch(F.linear(hidden, self.mix_proj, self.mix_proj_bias), groups)
        if self.mix_coef is not None and self.mixing == "expert":
            return F.embedding(groups.experts, self.mix_coef)
        return self.mix_coef

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        sizes = f"experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"
        return f"{sizes}, {self.spec}, coefficients per {self.mixing}, dispatch={self.method}"


class MoE(nn.Module):
    """Mixture of experts as a feedforward layer: `router`, `experts`, and `shared_experts` (an FFN or None).

    The shared experts are one FFN of width num_shared_experts * moe_intermediate_size with its own mixing
    coefficients. It is not gated, as in DeepSeekMoE: a gate (Qwen2-MoE) would be a further difference between the
    baseline and the mixtures.

    Args:
        config: A configuration with experts; `ffn_backend` computes the mixture of all experts, `expert_dispatch` the
            products of the routed experts.
    """

    def __init__(self, config: MoALlamaConfig) -> None:
        super().__init__()
        self.init_std = config.initializer_range
        self.router = TopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            init_std=config.initializer_range,
        )
        self.experts = Experts(config)
        shared_width = config.num_shared_experts * self.experts.hidden_dim
        self.shared_experts = None
        if shared_width > 0:
            self.shared_experts = FFN(config.hidden_size, shared_width, **config.ffn_arguments())
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize router and projections by normal(initializer_range), mixing and biases as in `FFN`."""
        self.router.init_weights()
        self.experts.init_weights()
        if self.shared_experts is not None:
            self.shared_experts.init_weights(partial(nn.init.normal_, std=self.init_std))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer to hidden (..., D) and return the same shape in hidden's dtype or autocast's."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, indices = self.router(flat)
        out = self.experts(flat, weights, indices).view(hidden.shape)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)
