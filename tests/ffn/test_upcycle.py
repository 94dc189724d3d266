"""Upcycling against the models of timm and transformers, with random weights."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moa_ffn import FFN, upcycle

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 16}
GLU = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma", "gemma2", "phi3"]
MLP = ["gpt2", "gpt_neox", "phi", "starcoder2", "nemotron"]


def language_model(kind: str) -> nn.Module:
    """Return a random tiny model of a transformers family, with weights large enough for every term to matter."""
    names = {"intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, **(SMALL if kind != "gpt2" else {"n_embd": 32, "n_head": 2, "n_layer": 2}), **names
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", GLU + MLP)
def test_language_models_keep_their_function_and_train(kind):
    model, ids = language_model(kind).eval(), torch.arange(3, 33).view(2, 15)
    before, text = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    found = upcycle(model, "qdmoa" if kind in GLU else "moa")
    assert len(found) == 2 and all(model.get_submodule(name) is layer for name, layer in found.items())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6 * before.abs().max().item())
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        assert all(layer.mix_proj.weight.grad.ne(0).any() for layer in found.values())
        optimizer.step()
    assert losses[-1] < losses[0]


MODULES = {
    "Mlp": (lambda: Mlp(16, 24, drop=(0.1, 0.2)), "moa"),
    "Mlp, relu": (lambda: Mlp(16, 24, act_layer=nn.ReLU), "la"),
    "SwiGLU": (lambda: SwiGLU(16, 24, bias=(True, False)), "qdmoa"),
    "SwiGLUPacked": (lambda: SwiGLUPacked(16, 24), "bimoa"),
    "GluMlp, gate first": (lambda: GluMlp(16, 24, act_layer=nn.GELU, gate_last=False), "onemoa"),
    "GluMlp, gate last": (lambda: GluMlp(16, 24, act_layer=nn.SiLU, bias=False), "qdla"),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_modules_of_timm(name, dtype):
    build, variant = MODULES[name]
    original = build().to(dtype)
    model = nn.Sequential(copy.deepcopy(original))
    (layer,) = upcycle(model, variant, mixing_gate="softmax").values()
    assert (layer.drop1.p, layer.drop2.p) == (original.drop1.p, original.drop2.p)
    x = torch.randn(5, 16).to(dtype)
    torch.testing.assert_close(model.eval()(x), original.eval()(x))


def test_vision_transformers_of_timm():
    for name, variant in (("vit_tiny_patch16_224", "moa"), ("eva02_tiny_patch14_224", "qdmoa")):
        model, image = timm.create_model(name, depth=2).eval(), torch.randn(1, 3, 224, 224)
        before = model(image)
        assert len(upcycle(model, variant)) == 2
        torch.testing.assert_close(model(image), before)


def test_clip_has_its_own_gelu():
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    (layer,) = upcycle(AutoModel.from_config(config), "moa").values()
    assert layer.spec.anchor == "quick_gelu" and "quick_gelu" in layer.spec.gate_activations


def test_weights_are_shared_and_settings_reach_the_layer():
    model = language_model("llama").to(torch.bfloat16).train()
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    found = upcycle(model.model.layers[1:], gate_activations="s,r2", mixing_gate="tanh")
    assert list(found) == ["0.mlp"]
    layer = found["0.mlp"]
    assert layer.up_proj.weight is weight and layer.mix_proj.weight.dtype == torch.bfloat16 and layer.training
    assert layer.spec.gate_activations == ("silu", "relu2") and layer.spec.mixing_gate == "tanh"
    assert not isinstance(model.model.layers[0].mlp, FFN)


class Scaled(Mlp):
    """An MLP whose structure does not show what it computes."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("build", "variant", "message"),
    [
        (lambda: Mlp(8, 8), "qdmoa", "no gated linear unit that 'qdmoa' could replace"),
        (lambda: nn.Linear(8, 8), "moa", "no two-matrix MLP that 'moa' could replace"),
        (lambda: Mlp(8, 8), "swiglu", "'swiglu' has no mixture"),
        (lambda: Mlp(8, 8, act_layer=nn.Mish), "moa", "0 cannot be replaced exactly: its activation Mish"),
        (lambda: Mlp(8, 8, norm_layer=nn.LayerNorm), "moa", r"0 cannot be .*: it has a LayerNorm \(norm\)"),
        (lambda: Scaled(8, 8), "moa", "0 cannot be replaced exactly: outputs differ by 5.0e-01"),
        (lambda: language_model("opt"), "moa", r"0.model.*layers.0 cannot be .*: it has a OPTAttention \(self_attn\)"),
    ],
)
def test_refusals_leave_the_model_unchanged(build, variant, message):
    model = nn.Sequential(build())
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        upcycle(model, variant)
    assert [type(module) for module in model.modules()] == before
