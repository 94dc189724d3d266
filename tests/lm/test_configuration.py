"""MoALlamaConfig: fields, config.json and errors."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from moa_lm import MoALlamaConfig
from moa_lm.configuration import FFN_FIELDS, build_config
from moa_train.errors import ConfigError


def saved(config: MoALlamaConfig, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_other_fields_are_those_of_llama():
    ours, theirs = MoALlamaConfig().to_dict(), LlamaConfig().to_dict()
    assert {name: ours[name] for name in theirs if name != "model_type"} == {
        name: value for name, value in theirs.items() if name != "model_type"
    }


@pytest.mark.parametrize("given_as", ["g,s,r2", ["gelu", "silu", "relu2"], ("g", "silu", "r2")])
def test_dictionaries_are_stored_as_full_names(given_as, tmp_path):
    config = MoALlamaConfig(ffn_gate_activations=given_as)
    assert config.ffn_gate_activations == ["gelu", "silu", "relu2"]
    assert saved(config, tmp_path)["ffn_gate_activations"] == ["gelu", "silu", "relu2"]


def test_config_json_round_trip(tmp_path):
    config = MoALlamaConfig(
        **{"ffn_variant": "bila", "ffn_mixing_gate": "tanh", "ffn_mixed_branch": "up", "ffn_mix_bias": True},
        **{"ffn_gate_activations": "r,t", "ffn_up_activations": ("l",), "ffn_mix_init_std": 0.5, "ffn_coef_init": -1.5},
        **{"num_experts": 8, "moe_intermediate_size": 7, "expert_mixing": "expert", "tie_word_embeddings": True},
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoALlamaConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.ffn_arguments() == config.ffn_arguments()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_variant": "mish"}, "ffn_variant.*'mish'"),
        ({"ffn_up_activations": "id,sine"}, "ffn_up_activations.*'sine'"),
        ({"ffn_mix_init_std": -0.1}, r"ffn_mix_init_std is -0\.1; it must be a finite number, 0 or above"),
        ({"ffn_coef_init": float("nan")}, "ffn_coef_init is nan; it must be a finite number"),
        ({"ffn_backend": "cuda"}, "ffn_backend is 'cuda'; it must be one of .*eager"),
        ({"ffn_gates": "tanh"}, "ffn_gates is 'tanh'; it must be a field of .*ffn_gate_activations"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu; ffn_variant decides"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of num_attention_heads 32"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be 1 or above"),
        ({"num_experts": -1}, "num_experts is -1; it must be an integer, 0 or above"),
        ({"num_experts": 8}, "moe_intermediate_size is None; it must be an integer, 1 or above"),
        ({"num_experts": 3, "moe_intermediate_size": 8}, "num_experts_per_tok is 4; it must be at most num_experts 3"),
        ({"expert_dispatch": "magic"}, "expert_dispatch is 'magic'; it must be one of .*loop"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no'; it must be true or false"),
        ({"hidden_size": 100}, "hidden size"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_config(**fields)


@pytest.mark.parametrize(("variant", "splits"), [("swiglu", True), ("qdmoa", False), ("qdla", False)])
def test_tensor_parallel_plan(variant, splits):
    plan = MoALlamaConfig(ffn_variant=variant).base_model_tp_plan
    assert ("layers.*.mlp.gate_proj" in plan) == splits
    attention = {name for name in LlamaConfig().base_model_tp_plan or {} if "attn" in name}
    assert attention <= set(plan)
    assert "base_model_tp_plan" not in MoALlamaConfig(ffn_variant=variant).to_dict()


SMALL = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
EXPERTS = ("num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size")
FUZZED = sorted([*FFN_FIELDS, *EXPERTS, "expert_mixing", "expert_dispatch", "norm_topk_prob"])


@pytest.mark.filterwarnings("default")  # of odd dtypes
def test_odd_values_are_kept_or_refused_by_name(fuzz, fuzzing):
    def attempt(changes):
        made = []
        error = fuzzing.refusal(lambda: made.append(build_config(**SMALL | changes)), ConfigError)
        assert error is None or any(name in str(error) for name in FUZZED), error
        for config in made:
            again = MoALlamaConfig.from_dict(json.loads(config.to_json_string()))
            assert again.to_json_string() == config.to_json_string()

    values = st.sampled_from(fuzzing.ODD)
    fuzz(st.dictionaries(st.sampled_from(FUZZED), values, min_size=1, max_size=3), attempt, examples=30)
