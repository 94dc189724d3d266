"""The models against transformers' Llama, and transformers' features on the models."""

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from moa_ffn import VARIANTS
from moa_lm import MoALlamaForCausalLM, MoALlamaModel
from moa_lm.modeling import document_positions

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILY = [*VARIANTS, "moe"]


def fields(name: str) -> dict[str, Any]:
    """Configuration fields of a member of FAMILY."""
    return {**EXPERTS, "ffn_variant": "qdmoa"} if name == "moe" else {"ffn_variant": name}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS error."""
    return ((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_swiglu_equals_llama(attention, tied, bias, tiny, llama, tokens):
    same = {"tie_word_embeddings": tied, "attn_implementation": attention, "mlp_bias": bias, "attention_bias": bias}
    theirs, ours = llama(**same), tiny(ffn_variant="swiglu", **same)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input_ids = tokens(3, 11)
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    results = [model(input_ids, attention_mask=mask, labels=labels) for model in (ours, theirs)]
    assert error(results[0].logits[mask > 0], results[1].logits[mask > 0]) < 1e-5
    assert torch.allclose(results[0].loss, results[1].loss, rtol=1e-5)
    for result in results:
        result.loss.backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        assert error(gradient, expected[name]) < 1e-5, name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([(4, 1, None), (4, 2, None), (2, 2, None), (4, 2, 16)]),
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
)
def test_swiglu_equals_llama_at_any_shape(heads, batch, length, tiny, llama, tokens):
    same = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    theirs, ours = llama(**same), tiny(ffn_variant="swiglu", **same)
    ours.load_state_dict(theirs.state_dict())
    input_ids = tokens(batch, length)
    assert error(ours(input_ids).logits, theirs(input_ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["bila", "moe"])
def test_generation_with_and_without_cache(name, tiny, tokens):
    model = tiny(**fields(name))
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    runs = [
        model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*runs)
    sequence = runs[0][1:]
    greedy = model(sequence).logits.argmax(-1)[0, 4:-1]
    assert torch.equal(greedy, sequence[0, 5:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_by_either_argument_name(name, tiny, tokens):
    model, input_ids = tiny(), tokens(1, 9)
    cache = DynamicCache(config=model.config)
    parts = [model(piece, use_cache=True, **{name: cache}).logits for piece in input_ids.split([4, 1, 4], dim=1)]
    assert error(torch.cat(parts, dim=1), model(input_ids).logits) < 1e-5


def test_resize_token_embeddings(tiny, tokens, tmp_path):
    model = tiny(tie_word_embeddings=True)
    input_ids = tokens(1, 6)
    with torch.no_grad():
        before = model(input_ids).logits
    model.resize_token_embeddings(120, mean_resizing=False)
    after = model(input_ids).logits
    assert after.shape[-1] == model.config.vocab_size == 120
    assert torch.equal(after[..., :101], before)
    model(input_ids, labels=torch.full_like(input_ids, 119)).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, after)


@pytest.mark.parametrize("name", ["bila", "moe"])
def test_save_and_load_with_auto_classes(name, tiny, tokens, tmp_path):
    model = tiny(**fields(name), ffn_mixing_gate="tanh", ffn_gate_activations="s,r", ffn_up_activations="id,l")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moa_llama"
    assert "auto_map" not in (tmp_path / "config.json").read_text()  # no code to be run from the checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoALlamaForCausalLM
    assert torch.equal(loaded(tokens(1, 6)).logits, model(tokens(1, 6)).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MoALlamaModel
    assert torch.equal(base(tokens(1, 6)).last_hidden_state, model.model(tokens(1, 6)).last_hidden_state)


@pytest.mark.parametrize("name", ["qdmoa", "bila", "moe"])
def test_initialization(name, tiny):
    model = tiny(
        **fields(name),
        **{"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1, "ffn_mix_init_std": 3.0},
        **{"ffn_coef_init": 0.7, "ffn_mix_bias": True},
    )
    for parameter, value in model.named_parameters():
        if "mix_coef" in parameter:
            assert (value == 0.7).all()
        elif parameter.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in parameter:
            assert (value == 1).all()
        else:
            expected = 3.0 if "mix_proj" in parameter else 0.1
            assert value.std().item() == pytest.approx(expected, rel=0.1), parameter


@pytest.mark.parametrize("variant", ["qdmoa", "bila", "bimoa", "moe"])
def test_missing_mixing_weights_are_initialized_on_load(variant, tiny, tmp_path):
    """Weights that the checkpoint lacks are neither empty nor initialized by Llama's rule."""
    saved = tiny(**{**fields(variant), "ffn_variant": "swiglu"})
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        ffn_variant=fields(variant)["ffn_variant"],
        ffn_mix_init_std=3.0,
        ffn_coef_init=0.7,
        ffn_mix_bias=variant in ("bimoa", "moe"),
    )
    kept = load_file(tmp_path / "model.safetensors")
    for name, value in loaded.named_parameters():
        if "mix_coef" in name:
            assert (value == 0.7).all()
        elif "mix_proj" in name and name.endswith("bias"):
            assert (value == 0).all()
        elif "mix_proj" in name:
            assert value.std().item() == pytest.approx(3.0, rel=0.3)
        else:
            assert torch.equal(value, kept[name]), name


@pytest.mark.skipif(torch.__version__ < "2.12", reason="transformers makes a mask in every graph of torch 2.11")
@pytest.mark.parametrize("packed", [False, True], ids=["positions left out", "positions of documents"])
def test_compiled_attention_has_a_mask_only_for_packed_documents(packed, tiny, tokens):
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    model, input_ids = tiny(ffn_variant="qdmoa", ffn_backend="eager"), tokens(2, 12)
    positions = {"position_ids": document_positions(input_ids, int(input_ids[0, 5]))} if packed else {}
    expected = model(input_ids, use_cache=False, **positions).logits
    found = torch.compile(model, backend=look, fullgraph=True)(input_ids, use_cache=False, **positions).logits
    assert torch.equal(found, expected)
    attention = [
        node.kwargs for node in graphs[0].graph.nodes if node.target is nn.functional.scaled_dot_product_attention
    ]
    assert len(graphs) == 1 and len(attention) == model.config.num_hidden_layers
    for arguments in attention:
        assert (arguments["attn_mask"] is not None) == packed and arguments["is_causal"] != packed
