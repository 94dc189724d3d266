"""Damaged configurations and checkpoints: each gives a model or one error of ours that names the cause."""

import json

import pytest
import torch
from hypothesis import strategies as st
from transformers.utils import logging

from moa_lm import MoALlamaConfig, MoALlamaForCausalLM
from moa_lm.configuration import FFN_FIELDS, build_config
from moa_train.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("default")  # torch warns of odd dtypes

SMALL = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FIELDS = sorted([*FFN_FIELDS, *EXPERTS, "num_shared_experts", "expert_mixing", "expert_dispatch", "norm_topk_prob"])


@pytest.fixture(autouse=True)
def silent(quiet):
    """Without transformers' warnings about odd values."""
    logging.set_verbosity(logging.CRITICAL)


def test_fields(fuzz, fuzzing):
    def attempt(changes):
        made = []
        error = fuzzing.refusal(lambda: made.append(build_config(**SMALL | changes)), ConfigError)
        assert error is None or any(name in str(error) for name in FIELDS), error
        for config in made:
            again = MoALlamaConfig.from_dict(json.loads(config.to_json_string()))
            assert again.to_json_string() == config.to_json_string()

    values = st.sampled_from(fuzzing.ODD)
    fuzz(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3), attempt, examples=30)


@pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["dense", "experts"])
def test_damaged_weights(fuzz, fuzzing, fields, tmp_path):
    torch.manual_seed(0)
    MoALlamaForCausalLM(MoALlamaConfig(**SMALL, ffn_variant="swiglu", **fields)).save_pretrained(tmp_path)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(tmp_path / name, content):
            error = fuzzing.refusal(lambda: MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa"), DataError)
        assert error is None or str(tmp_path) in str(error), error

    fuzz(fuzzing.damage(tmp_path, ["model.safetensors"]), attempt, examples=20)
