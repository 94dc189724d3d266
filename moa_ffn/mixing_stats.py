"""Statistics of a layer's mixing over many tokens, as run folders store and reports read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PERCENTILES = (0.05, 0.95)
"""Quantiles of the coefficients that a row reports as low and high."""


def mixing_row(
    layer: str, terms: Sequence[str], token_adaptive: bool, coefficients: Tensor, shares: Tensor
) -> dict[str, Any] | None:
    """Return mean, spread and mean share of each coefficient over N tokens, as JSON types.

    Args:
        layer: Name, such as "encoder.0" or "model.3".
        terms: K names, `FFNSpec.terms`.
        token_adaptive: False for learned constants.
        coefficients: (N, K), see `FFN.mixing`. Tokens with non-finite values are skipped.
        shares: (N, K), see `FFN.shares`.

    Returns:
        {"layer", "coefficients" (the terms), "token_adaptive", "mean", "std", "low", "high", "share"} with K values
        each; None if no token is finite, as in a diverged run.
    """
    finite = coefficients.isfinite().all(1) & shares.isfinite().all(1)
    if not finite.any():
        return None
    coefficients, shares = coefficients[finite], shares[finite]
    percentiles = torch.tensor(PERCENTILES, device=coefficients.device, dtype=coefficients.dtype)
    low, high = coefficients.quantile(percentiles, dim=0).tolist()
    return {
        "layer": layer,
        "coefficients": list(terms),
        "token_adaptive": token_adaptive,
        "mean": coefficients.mean(0).tolist(),
        "std": coefficients.std(0, correction=0).tolist(),
        "low": low,
        "high": high,
        "share": shares.mean(0).tolist(),
    }
