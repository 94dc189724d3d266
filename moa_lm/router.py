"""The router of a mixture of experts: top-k choice, its auxiliary losses, and the figures that training logs show.

Shapes: N tokens, B sequences of T tokens, D width, E experts, k experts a token.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TopKRouter(nn.Module):
    """Which k of E experts a token goes to, and with what weights: softmax over all experts, then the k largest.

    The product, the softmax and the weights are float32 in every setting, autocast and half precision included
    (float64 when the input is): rounded logits would change which experts are chosen (arXiv:2101.03961, section 2.4).

    Args:
        dim: width D of the tokens.
        num_experts: E.
        top_k: k, from 1 to E.
        normalize: divide the k weights of a token by their sum, as the paper's models do.
        init_std: standard deviation of the normal initialization.

    Raises:
        ValueError: `top_k` is not in 1..E.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, normalize: bool = True, init_std: float = 0.02
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"num_experts_per_tok={top_k} must be from 1 to num_experts={num_experts}")
        self.num_experts, self.top_k, self.normalize, self.init_std = num_experts, top_k, normalize, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal of standard deviation `init_std`."""
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
        """Settings shown by print(model)."""
        dim = self.weight.shape[1]
        return f"dim={dim}, experts={self.num_experts}, top_k={self.top_k}, normalize={self.normalize}"


def choose_experts(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of probabilities (..., E): values (..., k), and indices (..., k), int64, in descending order.

    Equal values go to the lower index, which `torch.topk` does not promise: a token's choice is a function of the
    token alone.
    """
    values, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def load_balancing_loss(
    router_logits: Tensor, k: int, attention_mask: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """Load-balancing loss of one layer: E * sum_e f_e P_e for each sequence, averaged over the sequences.

    f_e is the share of the sequence's k * T assignments that goes to expert e, P_e the mean of its probability.
    Perfect balance gives 1, everything on the same k experts up to E / k. The product is Switch Transformer's
    (arXiv:2101.03961, eq. 4 to 6, there for k = 1). Taken per sequence, as in DeepSeek-V3 (arXiv:2412.19437, eq. 17
    to 20), it is an average over sequences: equal micro-batches, whatever the ranks and the accumulation, average to
    the loss of the whole batch. transformers' `load_balancing_loss_func` is k times this for a single sequence and
    layer, and another thing for more, since it multiplies averages over the whole batch.

    Args:
        router_logits: (B, T, E), any floating dtype; computed in float32.
        k: experts a token.
        attention_mask: (B, T), nonzero where a token counts; None counts all. A sequence without any is left out.
        indices: (B, T, k) chosen experts; None takes the k largest logits, as `TopKRouter` does.

    Returns:
        Scalar, float32; 0 when no token counts. The gradient flows through P only.

    Raises:
        ValueError: a shape does not fit.
    """
    mask = _token_mask(router_logits, attention_mask)
    probabilities = _wide(router_logits).softmax(dim=-1)
    if indices is None:
        _, indices = choose_experts(probabilities.detach(), k)
    elif indices.shape != (*router_logits.shape[:-1], k):
        expected = (*router_logits.shape[:-1], k)
        raise ValueError(f"indices of shape {tuple(indices.shape)}: allowed is (B, T, k) = {expected}")
    chosen = torch.zeros_like(probabilities).scatter(-1, indices, 1.0)
    tokens = mask.sum(dim=1)  # (B,)
    scale = tokens.clamp_min(1).unsqueeze(-1)
    share = (chosen * mask.unsqueeze(-1)).sum(dim=1) / (k * scale)  # f (B, E)
    # Padding is masked by selection: its logits may hold anything, and 0 * nan is nan.
    mean = torch.where(mask.unsqueeze(-1) > 0, probabilities, 0.0).sum(dim=1) / scale  # P (B, E)
    losses = router_logits.shape[-1] * (share * mean).sum(dim=-1)
    return losses.sum() / (tokens > 0).sum().clamp_min(1)


def router_z_loss(router_logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        router_logits: (B, T, E), any floating dtype; computed in float32.
        attention_mask: (B, T), nonzero where a token counts; None counts all.

    Returns:
        Scalar, float32; 0 when no token counts.

    Raises:
        ValueError: a shape does not fit.
    """
    mask = _token_mask(router_logits, attention_mask)
    return _token_mean(_wide(router_logits).logsumexp(dim=-1).square(), mask)


@torch.no_grad()
def router_entropy(router_logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the entropy of the router's softmax, in nats: log(E) when undecided, 0 when certain.

    Arguments and errors as in `router_z_loss`; a scalar without gradient.
    """
    mask = _token_mask(router_logits, attention_mask)
    log_probabilities = _wide(router_logits).log_softmax(dim=-1)
    # A probability of 0 has a logarithm of -inf and contributes 0.
    terms = torch.where(log_probabilities > -torch.inf, log_probabilities.exp() * log_probabilities, 0.0)
    return _token_mean(-terms.sum(dim=-1), mask)


@torch.no_grad()
def expert_load(indices: Tensor, num_experts: int, attention_mask: Tensor | None = None) -> Tensor:
    """Share of the assignments that each expert gets.

    Args:
        indices: (..., k) chosen experts.
        num_experts: E.
        attention_mask: (...), nonzero where a token counts; None counts all.

    Returns:
        (E,) float32, of sum 1 (0 when no token counts); balance is 1 / E everywhere.

    Raises:
        ValueError: the mask's shape does not fit.
    """
    mask = _token_mask(indices, attention_mask)
    flat = indices.reshape(-1, indices.shape[-1])
    chosen = torch.zeros(len(flat), num_experts, device=indices.device).scatter(1, flat, 1.0)
    # A selection by the mask, then a sum of ones: exact and in no particular order up to 2^24 tokens.
    counts = (chosen * mask.reshape(-1, 1)).sum(dim=0)
    return counts / counts.sum().clamp_min(1)


def _without_autocast(device_type: str) -> Any:
    # torch.amp.is_autocast_available would be the question, but torch 2.11 cannot trace it into a graph.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_mask(per_token: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as 0 and 1 in float32, with the leading shape of per_token (..., *)."""
    shape = per_token.shape[:-1]
    if attention_mask is None:
        return torch.ones(shape, device=per_token.device)
    if attention_mask.shape != shape:
        given = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {given}: allowed is one entry for each token, {tuple(shape)}")
    return (attention_mask.to(per_token.device) != 0).float()


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask > 0, values, 0.0).sum() / mask.sum().clamp_min(1)
