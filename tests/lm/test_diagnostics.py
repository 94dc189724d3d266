"""Mixing and expert rows against direct computation from the inputs of the layers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_ffn.activations import ACTIVATIONS
from moa_lm.diagnostics import save, watch
from moa_lm.modeling import document_positions

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def inputs_of(model: torch.nn.Module, layer: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """Inputs (N, D) of a submodule."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    model(input_ids)
    handle.remove()
    return seen[0]


def shares_of(a: Tensor, b: Tensor | None, coefficients: Tensor, spec: Any) -> Tensor:
    """RMS of each term c_kl f_k(a) g_l(b) over the hidden width, as a fraction of their sum; (N, K)."""
    f = [ACTIVATIONS[name].function(a) for name in spec.gate_dictionary]
    g = [ACTIVATIONS[name].function(b) for name in spec.up_dictionary] or [torch.ones_like(a)]
    terms = torch.stack([fk * gl for fk in f for gl in g], dim=1) * coefficients.unsqueeze(-1)
    size = terms.square().mean(-1).sqrt()
    return size / size.sum(-1, keepdim=True)


def assert_row_equals(row: dict[str, Any], coefficients: Tensor, shares: Tensor) -> None:
    """Compare a row with numpy's statistics of coefficients and shares (N, K)."""
    values = coefficients.double().detach().numpy()
    expected = {
        "mean": values.mean(0),
        "std": values.std(0),
        "low": np.percentile(values, 5, axis=0),
        "high": np.percentile(values, 95, axis=0),
        "share": shares.double().detach().numpy().mean(0),
    }
    for key, value in expected.items():
        assert np.allclose(row[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("mixing", ["layer", "expert"])
@pytest.mark.parametrize("variant", ["la", "moa", "qdla", "bimoa", "qdmoa"])
def test_mixing_rows_of_experts(variant, mixing, tiny, tokens):
    """Computed per token and choice from the stacked weights."""
    model = tiny(ffn_variant=variant, expert_mixing=mixing, mlp_bias=True, ffn_mix_init_std=1.0, **EXPERTS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "mix_coef" in name:  # equal for all experts from the start
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    input_ids = tokens(2, 9)
    rows = {row["layer"]: row for row in watch(model, input_ids).mixing}
    assert list(rows) == ["model.0", "model.0.shared", "model.1", "model.1.shared"]
    moe = model.model.layers[1].mlp
    x, experts, spec = inputs_of(model, moe, input_ids), moe.experts, moe.experts.spec
    shared = moe.shared_experts
    mixed = shared.mixing(x).flatten(1)
    b = shared.up_proj(x) if spec.type_two else None
    assert_row_equals(rows["model.1.shared"], mixed, shares_of(shared.gate_proj(x), b, mixed, spec))

    coefficients, shares = [], []
    for token, chosen in zip(x, moe.router(x)[2], strict=True):
        for e in chosen.tolist():
            own = mixing == "expert"
            if spec.token_adaptive:
                gate = (experts.mix_proj[e] if own else experts.mix_proj) @ token
                flat = gate.sigmoid()
            else:
                flat = experts.mix_coef[e] if own else experts.mix_coef
            if spec.form == "separable":
                k1 = len(spec.gate_dictionary)
                flat = torch.outer(flat[:k1], flat[k1:]).flatten()
            a = experts.gate_proj[e] @ token + experts.gate_proj_bias[e]
            b = experts.up_proj[e] @ token + experts.up_proj_bias[e] if spec.type_two else None
            coefficients.append(flat)
            shares.append(shares_of(a[None], None if b is None else b[None], flat[None], spec)[0])
    assert_row_equals(rows["model.1"], torch.stack(coefficients), torch.stack(shares))


def test_expert_rows(tiny, tokens):
    model, input_ids = tiny(**EXPERTS), tokens(4, 10)
    rows = watch(model, input_ids).experts
    logits = model(input_ids, output_router_logits=True).router_logits
    assert [row["layer"] for row in rows] == ["model.0", "model.1"]
    for row, values in zip(rows, logits, strict=True):
        probabilities = values.double().softmax(-1).detach().numpy()
        chosen = np.argsort(-probabilities, axis=1)[:, :2]
        counts = np.bincount(chosen.flatten(), minlength=6)
        assert np.allclose(row["load"], counts / 80) and sum(row["load"]) == pytest.approx(1)
        assert row["entropy"] == pytest.approx(-(probabilities * np.log(probabilities)).sum(1).mean(), rel=1e-5)
        assert row["max_entropy"] == math.log(6) >= row["entropy"]
        by_sequence = zip(chosen.reshape(4, 20), probabilities.reshape(4, 10, 6), strict=True)
        balance = [6 * (np.bincount(c, minlength=6) / 20 * p.mean(0)).sum() for c, p in by_sequence]
        assert row["balance_loss"] == pytest.approx(np.mean(balance), rel=1e-5)
        assert (row["assignments"], row["dropped"]) == (80, 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_model_is_unchanged(training, tiny, tokens):
    model = tiny(**EXPERTS, attention_dropout=0.5).train(training)
    first, second = watch(model, tokens(2, 6)), watch(model, tokens(2, 6))
    assert first == second  # in evaluation mode: no dropout
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_document_positions_are_used(tiny, tokens):
    model, rows = tiny(ffn_mix_init_std=1.0), tokens(2, 12)
    positions = document_positions(rows, int(rows[0, 5]))
    apart = watch(model, rows, positions).mixing
    x = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0].flatten(0, 1)))
    model(rows, position_ids=positions, use_cache=False)
    handle.remove()
    mean = model.model.layers[1].mlp.mixing(x[0]).flatten(1).mean(0)
    assert apart[1]["mean"] == pytest.approx(mean.tolist(), rel=1e-5)
    assert apart[1]["mean"] != pytest.approx(watch(model, rows).mixing[1]["mean"], rel=1e-5)


@pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["dense", "moe"])
def test_no_rows_no_file(fields, tiny, tokens, tmp_path):
    watched = watch(tiny(ffn_variant="swiglu", **fields), tokens(2, 6))
    assert watched.mixing == [] and bool(watched.experts) is bool(fields)
    save(watched, tmp_path, step=1)
    assert [path.name for path in tmp_path.iterdir()] == (["experts"] if fields else [])


def test_non_finite_layers_have_no_row(tiny, tokens, tmp_path):
    """JSON has no NaN, and a diverged run must still write its rows."""
    model = tiny(**EXPERTS)
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight.fill_(torch.nan)
        model.model.layers[1].mlp.experts.mix_proj.fill_(torch.nan)
    watched = watch(model, tokens(2, 6))
    assert [row["layer"] for row in watched.experts] == ["model.0"]
    assert [row["layer"] for row in watched.mixing] == ["model.0", "model.0.shared", "model.1.shared"]
    save(watched, tmp_path, step=3)
