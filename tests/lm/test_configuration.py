"""MoALlamaConfig: what it accepts, what config.json keeps, what its errors say."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from moa_ffn import ACTIVATIONS, FFN, GATES, VARIANTS
from moa_lm import MoALlamaConfig


def saved(config: MoALlamaConfig, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_defaults_are_the_layer_s_own():
    ffn = FFN(8, 8, **MoALlamaConfig().ffn_arguments())
    assert (ffn.spec, ffn.mix_init_std, ffn.coef_init) == (
        FFN(8, 8).spec,
        FFN(8, 8).mix_init_std,
        FFN(8, 8).coef_init,
    )
    assert MoALlamaConfig().num_experts == 0


def test_everything_else_is_llama_s():
    ours, theirs = MoALlamaConfig().to_dict(), LlamaConfig().to_dict()
    assert {name: ours[name] for name in theirs if name != "model_type"} == {
        name: value for name, value in theirs.items() if name != "model_type"
    }


@pytest.mark.parametrize("given_as", ["g,s,r2", ["gelu", "silu", "relu2"], ("g", "silu", "r2")])
def test_dictionaries_are_kept_as_full_names(given_as, tmp_path):
    config = MoALlamaConfig(ffn_gate_activations=given_as)
    assert config.ffn_gate_activations == ["gelu", "silu", "relu2"]
    assert saved(config, tmp_path)["ffn_gate_activations"] == ["gelu", "silu", "relu2"]


def test_default_dictionaries_are_written_down(tmp_path):
    # A later version may have other defaults; a checkpoint keeps what it was made with.
    written = saved(MoALlamaConfig(), tmp_path)
    assert written["ffn_gate_activations"] == ["gelu", "silu", "relu2"]
    assert written["ffn_up_activations"] == ["identity", "tanh"]


dictionaries = st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, unique=True)


@settings(max_examples=25, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "ffn_variant": st.sampled_from(VARIANTS),
            "ffn_mixing_gate": st.sampled_from(GATES),
            "ffn_gate_activations": dictionaries,
            "ffn_up_activations": dictionaries.map(tuple),
            "ffn_mixed_branch": st.sampled_from(["gate", "up"]),
            "ffn_mix_bias": st.booleans(),
            "ffn_mix_init_std": st.floats(0, 10),
            "ffn_coef_init": st.floats(-10, 10),
            "tie_word_embeddings": st.booleans(),
            "num_experts": st.sampled_from([0, 8]),
            "moe_intermediate_size": st.integers(1, 512),
            "expert_mixing": st.sampled_from(["layer", "expert"]),
            "rope_parameters": st.sampled_from([None, {"rope_type": "default", "rope_theta": 5e5}]),
        }
    )
)
def test_config_json_round_trip(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config = MoALlamaConfig(**fields)
    config.save_pretrained(folder)
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is MoALlamaConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.ffn_arguments() == config.ffn_arguments()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ffn_variant": "geglu"}, ["ffn_variant='geglu'", "swiglu", "qdmoa"]),
        ({"ffn_mixing_gate": "relu"}, ["ffn_mixing_gate='relu'", "sigmoid, tanh, softmax"]),
        ({"ffn_up_activations": "id,sine"}, ["ffn_up_activations", "'sine'", "leaky_relu (l)"]),
        ({"ffn_gate_activations": ["silu", "s"]}, ["ffn_gate_activations", "none twice"]),
        ({"ffn_mixed_branch": "both"}, ["ffn_mixed_branch='both'", "gate, up"]),
        ({"ffn_mix_init_std": -0.1}, ["ffn_mix_init_std=-0.1", "0 or more"]),
        ({"ffn_coef_init": float("nan")}, ["ffn_coef_init=nan", "finite"]),
        ({"ffn_backend": "cuda"}, ["ffn_backend='cuda'", "eager"]),
        ({"ffn_gate_activations": 7}, ["ffn_gate_activations=7", "names of activations"]),
        ({"ffn_up_activations": [["tanh"]]}, ["ffn_up_activations=[['tanh']]", "names of activations"]),
        ({"ffn_coef_init": 10**400}, ["ffn_coef_init=1000", "finite"]),
        ({"ffn_gates": "tanh"}, ["'ffn_gates'", "ffn_gate_activations"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "ffn_variant"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=32"]),
        ({"hidden_size": 100}, ["hidden_size=100", "num_attention_heads=32"]),
        ({"hidden_size": 10**9}, ["hidden_size=1000000000", "from 1 to 1048576"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "from 1 to 4096"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"hidden_size": 96}, ["head_dim=3", "even"]),
        ({"pad_token_id": 32000}, ["pad_token_id=32000", "below vocab_size=32000"]),
        ({"vocab_size": 0}, ["vocab_size=0", "from 1 to"]),
        ({"num_experts": -1}, ["num_experts=-1"]),
        ({"num_experts": 8}, ["moe_intermediate_size=None", "num_experts > 0"]),
        ({"num_experts": 3, "moe_intermediate_size": 8}, ["num_experts_per_tok=4", "num_experts=3"]),
        ({"expert_mixing": "token"}, ["expert_mixing='token'", "layer, expert"]),
        ({"expert_dispatch": "magic"}, ["expert_dispatch='magic'", "loop"]),
        ({"num_shared_experts": 1.5}, ["num_shared_experts=1.5"]),
        ({"norm_topk_prob": "no"}, ["norm_topk_prob='no'", "true or false"]),
        ({"router_aux_loss_coef": -1}, ["router_aux_loss_coef=-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_field_value_and_what_is_allowed(fields, words):
    with pytest.raises(ValueError) as error:
        MoALlamaConfig(**fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("variant", "splits"), [("swiglu", True), ("qdmoa", False), ("qdla", False)])
def test_tensor_parallel_plan_is_llama_s_where_it_is_right(variant, splits):
    plan = MoALlamaConfig(ffn_variant=variant).base_model_tp_plan
    assert ("layers.*.mlp.gate_proj" in plan) == splits
    attention = {name for name in LlamaConfig().base_model_tp_plan or {} if "attn" in name}
    assert attention <= set(plan)
    assert "base_model_tp_plan" not in MoALlamaConfig(ffn_variant=variant).to_dict()
