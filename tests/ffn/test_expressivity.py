"""The paper's three separations: built by hand, exact; not reachable by the weaker class at the same width."""

import numpy as np
import pytest
import torch

from moa_ffn.expressivity import LAMBDA, WIDTH, WITNESSES, fit, grid, relative_error

FORMULAS = [
    lambda x, y: np.maximum(x, 0) + np.maximum(x, 0) ** 2,
    lambda x, y: np.tanh(LAMBDA * x) * np.maximum(y, 0),
    lambda x, y: np.maximum(y, 0) * np.maximum(x, 0) * np.tanh(x),
]


@pytest.mark.parametrize("number", range(len(WITNESSES)), ids=[w.stronger for w in WITNESSES])
def test_built_by_hand_is_exact(number):
    witness, formula = WITNESSES[number], FORMULAS[number]
    x = torch.randn(1000, 2, dtype=torch.float64) * 3
    ffn = witness.built()
    assert ffn.hidden_dim == WIDTH
    expected = formula(*x.T.numpy())
    np.testing.assert_allclose(ffn(x)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-6)
    assert ffn(x)[:, 1].abs().max() == 0


@pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: w.weaker)
def test_weaker_class_cannot_reach_it(witness):
    candidates = witness.candidates()
    assert all(ffn.hidden_dim == WIDTH for ffn in candidates)
    assert fit(candidates, witness, grid(17), starts=3, steps=60) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: w.stronger)
def test_the_same_fit_finds_it_in_the_stronger_class(witness):
    assert fit([witness.built()], witness, grid(17), starts=12, steps=200) < 1e-5
    assert relative_error(witness.built(), witness, grid(17)) < 1e-12
