"""Language models' configurations and folders that something has damaged: each is a model, or one message.

Where transformers, tokenizers or safetensors read a file with nothing of ours around it, their errors are their own:
AutoModelForCausalLM and AutoTokenizer of a damaged folder, dtype and id2label in config.json. Ours are
MoALlamaConfig's fields, from_llama and load_tokenizer; tests/eval/test_fuzz_models.py reads folders as lm-eval does.
"""

import json
from dataclasses import fields

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from hypothesis import strategies as st
from transformers import PreTrainedConfig
from transformers.utils import logging

from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

FILES = ("config.json", "config.json", "config.json", "model.safetensors", "generation_config.json")
REFUSALS = (ValueError, StrictDataclassFieldValidationError, StrictDataclassClassValidationError)
"""What a configuration raises; the latter two are transformers', for Llama's own fields, and name them too."""

FIELDS = sorted({field.name for field in fields(MoALlamaConfig)} - {field.name for field in fields(PreTrainedConfig)})
SMALL = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "dense": {"ffn_variant": "swiglu"},
    "experts": {"ffn_variant": "swiglu", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A saved model; whoever damages it mends it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    MoALlamaForCausalLM(MoALlamaConfig(**SMALL, **KINDS[request.param])).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def silent(quiet):
    """transformers says nothing of odd values; the fixture `quiet` gives it its voice back."""
    logging.set_verbosity(logging.CRITICAL)


def test_fields(fuzz, fuzzing):
    """Fields of any values: a configuration that a model can be built of and that can be kept, or one message."""

    def attempt(changes):
        made = []
        error = fuzzing.refusal(lambda: made.append(MoALlamaConfig(**SMALL | changes)), *REFUSALS)
        assert error is None or any(name in str(error) for name in changes), error
        for config in made:
            with torch.device("meta"):
                MoALlamaForCausalLM(config)
            again = MoALlamaConfig.from_dict(json.loads(config.to_json_string()))
            assert again.to_json_string() == config.to_json_string()

    values = st.sampled_from(fuzzing.ODD)
    fuzz(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3), attempt, examples=30)


def test_takeover(fuzz, fuzzing, folder):
    """from_llama: a model, or an error whose message names the folder, or the field that cannot be carried over."""

    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: MoALlamaForCausalLM.from_llama(folder, "qdmoa"), ValueError, OSError)
        assert error is None or str(folder) in str(error) or str(error).startswith(tuple(FIELDS)), error

    fuzz(fuzzing.damage(folder, FILES), attempt, examples=20)
