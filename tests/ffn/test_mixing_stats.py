"""The row of a layer's mixing, against numpy."""

import json

import numpy as np
import pytest
import torch

from moa_ffn.mixing_stats import mixing_row


def test_row_is_numpy_s():
    generator = np.random.default_rng(0)
    coefficients, shares = generator.random((2, 50, 3), dtype=np.float32)
    row = mixing_row("model.0", ["a", "b", "c"], True, torch.from_numpy(coefficients), torch.from_numpy(shares))
    assert row == json.loads(json.dumps(row)) and row["coefficients"] == ["a", "b", "c"] and row["token_adaptive"]
    expected = {
        "mean": coefficients.mean(0),
        "std": coefficients.std(0),
        "low": np.quantile(coefficients, 0.05, axis=0),
        "high": np.quantile(coefficients, 0.95, axis=0),
        "share": shares.mean(0),
    }
    for key, values in expected.items():
        np.testing.assert_allclose(row[key], values, rtol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=str)
def test_tokens_that_are_no_numbers_are_left_out(broken):
    coefficients = torch.tensor([[0.25], [broken], [0.75]])
    row = mixing_row("model.0", ["a"], True, coefficients, torch.ones(3, 1))
    assert row is not None and row["mean"] == [0.5]
    assert mixing_row("model.0", ["a"], True, coefficients[1:2], torch.ones(1, 1)) is None
