"""Router of a mixture of experts: top-k choice, auxiliary losses and statistics.

Shapes: N tokens, B sequences of T tokens, D width, E experts, k experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopKRouter(nn.Module):
    """Choice of k out of E experts per token: softmax over all experts, then the k largest.

    The product, the softmax and the weights are float32 under autocast and in half precision too (float64 for a
    float64 input): rounded logits would change the choice of experts (arXiv:2101.03961, section 2.4).

    Args:
        dim: Width D of the tokens.
        num_experts: E.
        top_k: k, from 1 to E.
        normalize: Divide the k weights of a token by their sum, as in the paper's models.
        init_std: Standard deviation of the normal initialization.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, normalize: bool = True, init_std: float = 0.02
    ) -> None:
        super().__init__()

        self.num_experts, self.top_k, self.normalize, self.init_std = num_experts, top_k, normalize, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weight by a normal distribution of standard deviation `init_std`."""
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route hidden (N, D).

        Returns:
            logits (N, E) and weights (N, k), float32; indices (N, k), int64, the largest weight first.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with _without_autocast(hidden.device.type):
            logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
            weights, indices = choose_experts(logits.softmax(dim=-1), self.top_k)
            if self.normalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, indices

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        dim = self.weight.shape[1]
        return f"dim={dim}, experts={self.num_experts}, top_k={self.top_k}, normalize={self.normalize}"


def choose_experts(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of probabilities (..., E) in descending order: values (..., k), indices (..., k) int64.

    Ties go to the lower index, which `torch.topk` does not guarantee: the choice depends on the token only.
    """
    values, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def load_balancing_loss(router_logits: Tensor, k: int, attention_mask: Tensor | None = None) -> Tensor:
    """Return the load-balancing loss of one layer: E * sum_e f_e P_e of each sequence, averaged over the sequences.

    f_e is the fraction of the sequence's k * T assignments that goes to expert e, P_e the mean of its probability.
    Perfect balance gives 1, the same k experts for all tokens up to E / k. The product is that of Switch Transformer
    (arXiv:2101.03961, eq. 4 to 6, for k = 1), taken per sequence as in DeepSeek-V3 (arXiv:2412.19437, eq. 17 to 20):
    the losses of equal micro-batches average to the loss of the whole batch for any number of ranks. For one sequence
    and layer, transformers' `load_balancing_loss_func` is k times this; for more it multiplies batch averages.

    The logits are (B, T, E). Tokens and sequences with zeros in the mask (B, T) are left out. The result is a float32
    scalar, 0 without tokens; its gradient flows through P only.

    Raises:
        ValueError: The shape of the mask is not (B, T).
    """
    mask = _token_mask(router_logits, attention_mask)
    probabilities = _wide(router_logits).softmax(dim=-1)
    _, indices = choose_experts(probabilities.detach(), k)
    chosen = torch.zeros_like(probabilities).scatter(-1, indices, 1.0)
    tokens = mask.sum(dim=1)  # (B,)
    scale = tokens.clamp_min(1).unsqueeze(-1)
    share = (chosen * mask.unsqueeze(-1)).sum(dim=1) / (k * scale)  # f (B, E)
    # Selection rather than multiplication: logits of padding may be nan.
    mean = torch.where(mask.unsqueeze(-1) > 0, probabilities, 0.0).sum(dim=1) / scale  # P (B, E)
    losses = router_logits.shape[-1] * (share * mean).sum(dim=-1)
    return losses.sum() / (tokens > 0).sum().clamp_min(1)


def router_z_loss(router_logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2, the z-loss of ST-MoE (arXiv:2202.08906, eq. 5).

    Shapes, mask, result and errors are those of `load_balancing_loss`.
    """
    mask = _token_mask(router_logits, attention_mask)
    squares = _wide(router_logits).logsumexp(dim=-1).square()
    return torch.where(mask > 0, squares, 0.0).sum() / mask.sum().clamp_min(1)


@torch.no_grad()
def router_entropy(router_logits: Tensor) -> Tensor:
    """Return the mean entropy of the router's softmax in nats, from 0 to log(E), for router_logits (..., E)."""
    log_probabilities = _wide(router_logits).log_softmax(dim=-1)
    # Probabilities of 0 contribute 0, not 0 * -inf.
    terms = torch.where(log_probabilities > -torch.inf, log_probabilities.exp() * log_probabilities, 0.0)
    return -terms.sum(dim=-1).mean()


@torch.no_grad()
def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """Return the fraction (E,) of the assignments that goes to each expert, for chosen experts (..., k)."""
    return torch.bincount(indices.flatten(), minlength=num_experts) / indices.numel()


def _without_autocast(device_type: str) -> Any:
    # torch 2.11 cannot trace torch.amp.is_autocast_available into a graph.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_mask(per_token: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mask as 0 and 1 in float32, with the leading shape of per_token (..., *)."""
    shape = per_token.shape[:-1]
    if attention_mask is None:
        return torch.ones(shape, device=per_token.device)
    if attention_mask.shape != shape:
        given = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {given}; it must have one entry per token, {tuple(shape)}")
    return (attention_mask.to(per_token.device) != 0).float()
