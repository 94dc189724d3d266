"""What a layer's mixing comes to over many tokens: the row that run folders keep and reports read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PERCENTILES = (0.05, 0.95)


def mixing_row(
    layer: str, terms: Sequence[str], token_adaptive: bool, coefficients: Tensor, shares: Tensor
) -> dict[str, Any] | None:
    """The spread of each coefficient over N tokens, and the mean share of its term, as JSON types.

    Args:
        layer: name, such as "encoder.0" or "model.3".
        terms: K names, `FFNSpec.terms`.
        token_adaptive: False for learned constants.
        coefficients: (N, K), see `FFN.mixing`; tokens with values that are not finite are left out.
        shares: (N, K), see `FFN.shares`.

    Returns:
        {"layer", "coefficients" (the terms), "token_adaptive", "mean", "std", "low", "high", "share"}: K values each,
        with `PERCENTILES` as low and high; None where no token is finite.
    """
    known = coefficients.isfinite().all(1) & shares.isfinite().all(1)
    if not known.any():  # weights so large that nothing is a number any more
        return None
    coefficients, shares = coefficients[known], shares[known]
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
