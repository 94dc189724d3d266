"""The paper's three separations: exact when built by hand, out of reach of the weaker class at the same width."""

import numpy as np
import pytest
import torch

from moa_ffn.expressivity import LAMBDA, WIDTH, WITNESSES, fit, grid, relative_error

FORMULAS = [
    lambda x, y: np.maximum(x, 0) + np.maximum(x, 0) ** 2,
    lambda x, y: np.tanh(LAMBDA * x) * np.maximum(y, 0),
    lambda x, y: np.maximum(y, 0) * np.maximum(x, 0) * np.tanh(x),
]


@pytest.mark.parametrize(("witness", "formula"), list(zip(WITNESSES, FORMULAS, strict=True)))
def test_built_witness_is_exact(witness, formula):
    x, ffn = torch.randn(1000, 2, dtype=torch.float64) * 3, witness.built()
    assert ffn.hidden_dim == WIDTH
    np.testing.assert_allclose(ffn(x)[:, 0].detach().numpy(), formula(*x.T.numpy()), rtol=0, atol=1e-6)
    assert not ffn(x)[:, 1].any()


@pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: w.weaker)
def test_weaker_class_does_not_fit(witness):
    candidates = witness.candidates()
    assert all(ffn.hidden_dim == WIDTH for ffn in candidates)
    assert fit(candidates, witness, grid(17), starts=3, steps=60) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: w.stronger)
def test_stronger_class_fits(witness):
    assert fit([witness.built()], witness, grid(17), starts=12, steps=200) < 1e-5
    assert relative_error(witness.built(), witness, grid(17)) < 1e-12
