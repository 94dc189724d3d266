"""What is compared in the benchmarks computes the same: implementations of the layer and of the mixture, decoding."""

import argparse

import pytest
import torch

from moa_ffn import VARIANTS, FFNSpec
from moa_ffn.backends import reference
from moa_lm import MoALlamaForCausalLM

CPU, TOKENS, HIDDEN = torch.device("cpu"), 5, 8
ABLE = ("eager", "cpu", "naive")


@pytest.mark.parametrize("variant", VARIANTS)
def test_naive_layer_is_the_layer(part, variant):
    ffn = part("ffn")
    ours = ffn.build_layer("eager", 6, variant, CPU, torch.float64)
    naive = ffn.build_layer("naive", 6, variant, CPU, torch.float64)
    naive.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(naive(x), ours(x))
    assert naive.hidden_dim == (16 if ours.spec.type_two else 24)


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixtures_are_the_reference(part, variant, name):
    mixture, spec = part("mixture"), FFNSpec(variant)
    operands = mixture.operands(spec, TOKENS, HIDDEN, CPU, torch.float64)
    own = mixture.build(name, spec)
    with torch.no_grad():
        found = own.forward(*operands)
    inputs = [None if t is None else t.clone().requires_grad_() for t in operands]
    a, b, mix = inputs
    matrix = mixture.coefficient_matrix(spec, a, mix)
    expected = reference.mixture(a, b, matrix, spec.gate_dictionary, spec.up_dictionary)
    torch.testing.assert_close(found, expected)
    if own.backward is not None:
        grad = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [t for t in (a, b) if t is not None], grad)
        with torch.no_grad():
            grad_a, grad_b, *_, hidden = own.backward(*operands, grad)
        torch.testing.assert_close([t for t in (grad_a, grad_b) if t is not None], list(wanted))
        torch.testing.assert_close(hidden, expected)


def case(part, variant, name, which):
    mixture, spec = part("mixture"), FFNSpec(variant)
    tensors = mixture.operands(spec, TOKENS, HIDDEN, CPU, torch.float32)
    return mixture.mixture_case(mixture.build(name, spec), tensors, which, lambda function: function, {})


def test_bytes_are_those_of_the_formula(part):
    element, coefficients = 4, 6  # of a float32; of qd-MoA
    row = HIDDEN * element
    assert case(part, "swiglu", "eager", "forward").items == TOKENS * 3 * row
    assert case(part, "gelu", "eager", "forward").items == TOKENS * 2 * row
    assert case(part, "qdmoa", "eager", "forward").items == TOKENS * (3 * row + coefficients * element)
    assert case(part, "swiglu", "eager", "backward").items == TOKENS * 6 * row  # a, b, grad; two gradients, hidden
    assert case(part, "swiglu", "naive", "backward").items == TOKENS * 5 * row  # it has stored the hidden tensor
    assert case(part, "qdmoa", "eager", "backward").items == TOKENS * (6 * row + 2 * coefficients * element)


def test_each_backward_has_operands_of_its_own(part):
    measured = case(part, "swiglu", "naive", "backward")
    (_, first), (_, second) = measured.prepare(), measured.prepare()
    first[0].data.zero_()  # as Liger's backward does
    assert second[0].abs().sum() > 0


def test_decoding_is_generates(part):
    from moa_lm import MoALlamaForCausalLM, named_config

    torch.manual_seed(0)
    settings = {"vocab_size": 97, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = MoALlamaForCausalLM(named_config("dense-tiny", "qdmoa", **settings)).eval()
    prompt = torch.randint(97, (2, 5))
    decoding = part("infer").Decoding(model, model, prompt, 4)
    with torch.no_grad():
        tokens = [decoding.run(decoding.prepare()) for _ in range(2)]
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=5,
        min_new_tokens=5,
        pad_token_id=0,
    )
    assert tokens[0].equal(expected[:, 5:])
    assert tokens[1].equal(tokens[0])  # the cache was reset
    cache = 2 * 2 * 2 * 9 * model.config.hidden_size * 4  # keys and values, layers, sequences, positions
    assert decoding.held_bytes() == part("training").held_bytes(model) + cache


def test_llama_has_the_weights_of_ours(part):
    from transformers import LlamaForCausalLM

    lm = part("lm")
    args = argparse.Namespace(size="dense-tiny", vocab=97, tokens=8, layers=2)
    ours, theirs = lm.our_config(args, "swiglu"), LlamaForCausalLM(lm.llama_config(args))
    model = MoALlamaForCausalLM(ours)
    model.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    tokens = torch.randint(97, (1, 8))
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits)


def test_layers_with_experts_are_of_one_size(part):
    lm = part("lm")
    layers = lm.expert_layers(lm.experts_config("moe-tiny"), 3, CPU, torch.float32)
    counts = {name: sum(weight.numel() for weight in layer.parameters()) for name, layer in layers.items()}
    ours = counts.pop("moa_lm.MoE")
    dense = counts.pop("dense FFN")
    assert set(counts.values()) == {ours + 256}  # the gate of their shared expert
    assert ours == 256 * 8 + dense // 3 * 9  # a router; three experts are active, nine are there
    assert "transformers, batched_mm" in counts
    large = lm.expert_layers(lm.experts_config("moe-tiny"), 2048, CPU, torch.float32)
    assert "transformers, batched_mm" not in large  # 2048 * 2 copies of 2 * 192 * 256 weights


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "triton", "liger"])
def test_mixtures_of_a_gpu_are_the_reference(part, name):
    mixture, spec = part("mixture"), FFNSpec("swiglu")
    a, b, mix = mixture.operands(spec, TOKENS, HIDDEN, torch.device("cuda"), torch.float32)
    if reason := mixture.unavailable_reason(name, spec, a):
        pytest.skip(reason)
    expected = torch.nn.functional.silu(a) * b
    torch.testing.assert_close(mixture.build(name, spec).forward(a, b, mix), expected)
