"""The statistics of a layer's mixing against numpy."""

import json

import numpy as np
import torch

from moa_ffn.mixing_stats import mixing_row


def test_row_against_numpy():
    coefficients, shares = np.random.default_rng(0).random((2, 50, 3), dtype=np.float32)
    row = mixing_row("model.0", ["a", "b", "c"], True, torch.from_numpy(coefficients), torch.from_numpy(shares))
    assert row == json.loads(json.dumps(row)) and row["coefficients"] == ["a", "b", "c"] and row["token_adaptive"]
    expected = {"mean": coefficients.mean(0), "std": coefficients.std(0), "share": shares.mean(0)}
    expected |= {key: np.quantile(coefficients, q, axis=0) for key, q in (("low", 0.05), ("high", 0.95))}
    for key, values in expected.items():
        np.testing.assert_allclose(row[key], values, rtol=1e-5)


def test_non_finite_tokens_are_skipped():
    coefficients = torch.tensor([[0.25], [float("nan")], [float("inf")], [0.75]])
    row = mixing_row("model.0", ["a"], True, coefficients, torch.ones(4, 1))
    assert row is not None and row["mean"] == [0.5]
    assert mixing_row("model.0", ["a"], True, coefficients[1:3], torch.ones(2, 1)) is None
