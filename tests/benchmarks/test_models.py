"""Compared implementations compute the same function and have the same size."""

import argparse

import pytest
import torch

from benchmarks import ffn, lm, models
from benchmarks.infer import Decoding
from moa_ffn import VARIANTS, FFNSpec
from moa_lm import MoALlamaForCausalLM, named_config

CPU, TOKENS, HIDDEN = torch.device("cpu"), 5, 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_naive_layer(variant):
    ours, naive = (ffn.build_layer(name, 6, variant, CPU, torch.float64) for name in ("eager", "naive"))
    naive.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(naive(x), ours(x))
    assert naive.hidden_dim == (16 if ours.spec.type_two else 24)


@pytest.mark.parametrize("name", ["cpu", "naive"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixtures(variant, name):
    spec = FFNSpec(variant)
    operands = ffn.operands(spec, TOKENS, HIDDEN, CPU, torch.float64)
    torch.testing.assert_close(
        ffn.mixture_function(name, spec)(*operands), ffn.mixture_function("eager", spec)(*operands)
    )


@pytest.mark.parametrize(
    ("variant", "which", "rows", "coefficients"),
    [("gelu", "forward", 2, 0), ("swiglu", "forward", 3, 0), ("qdmoa", "forward", 3, 6), ("qdmoa", "backward", 5, 12)],
)
def test_moved_bytes(variant, which, rows, coefficients):
    operands = ffn.operands(FFNSpec(variant), TOKENS, HIDDEN, CPU, torch.float32)
    case = ffn.mixture_case(ffn.mixture_function("eager", FFNSpec(variant)), operands, which, {})
    assert case.items == TOKENS * 4 * (rows * HIDDEN + coefficients)


def test_decoding_equals_generate():
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = MoALlamaForCausalLM(named_config("dense-tiny", "qdmoa", **settings)).eval()
    prompt = torch.randint(97, (2, 5))
    decoding = Decoding(model, model, prompt, 4)
    with torch.no_grad():
        first, second = (decoding.run(decoding.prepare()) for _ in range(2))
    lengths = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
    assert first.equal(expected[:, 5:]) and second.equal(first)
    cache = 2 * 2 * 2 * 9 * model.config.hidden_size * 4  # keys and values, layers, sequences, positions
    assert decoding.held_bytes() == models.held_bytes(model) + cache


def test_llama_equals_ours():
    model = lm.our_model(argparse.Namespace(size="dense-tiny", vocab=97, tokens=8, layers=2), "swiglu")
    llama = lm.llama(model)
    model.load_state_dict(llama.state_dict())
    tokens = torch.randint(97, (1, 8))
    torch.testing.assert_close(model(tokens).logits, llama(tokens).logits)


def test_layers_with_experts_have_one_size():
    layers = lm.expert_layers(lm.experts_config("moe-tiny"), 3, CPU, torch.float32)
    counts = {name: sum(weight.numel() for weight in layer.parameters()) for name, layer in layers.items()}
    ours, dense = counts.pop("moa_lm.MoE"), counts.pop("dense FFN")
    assert set(counts.values()) == {ours + 256}  # the gate of their shared expert
    assert ours == 256 * 8 + dense // 3 * 9  # a router; three of nine experts are active
    many = lm.expert_layers(lm.experts_config("moe-tiny"), 2048, CPU, torch.float32)
    assert counts.keys() - many.keys() == {"transformers, batched_mm"}


def test_held_bytes_are_weights_and_two_moments():
    model = torch.nn.Linear(7, 5)
    model.register_buffer("more", torch.zeros(3, dtype=torch.float64))
    optimizer, weights = models.adamw(model), 4 * (7 * 5 + 5)
    assert models.held_bytes(model, optimizer) == weights + 24
    before = model.weight.detach().clone()
    models.train_step(lambda: model(torch.ones(2, 7)).sum(), optimizer, models.autocast(CPU))
    assert not model.weight.equal(before) and model.weight.grad is None
    assert models.held_bytes(model, optimizer) == 3 * weights + 24 + 2 * 4  # a float32 counter per tensor
