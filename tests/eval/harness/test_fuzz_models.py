"""Damaged checkpoints: MoALM scores, or raises a ModelError of one line that names the checkpoint."""

import json

import huggingface_hub.constants
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from moa_eval.harness import MoALM, ModelError
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval, transformers and tokenizers

FILES = ("config.json", "config.json", "model.safetensors", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PAIRS = (("a man", " sits"), ("", "on a roof"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["a man sits on a roof"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    MoALlamaForCausalLM(MoALlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Use no network; silence transformers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(before)


def score(folder):
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in PAIRS]
    return MoALM(str(folder), device="cpu").loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize(("files", "examples"), [(FILES, 10), (TOKENIZER, 10)], ids=["model", "tokenizer"])
def test_damaged_checkpoints(fuzz, fuzzing, folder, offline, files, examples):
    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: score(folder), ModelError)
        assert error is None or (str(folder) in str(error) and "\n" not in str(error)), error

    fuzz(fuzzing.damage(folder, files), attempt, examples=examples)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"num_hidden_layers": 2}, r"lacks 'model\.layers\.1"),
        ("config.json", {"intermediate_size": 2**20}, r"cannot load the weights of .*shape"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "cannot load a tokenizer from"),
        ("tokenizer_config.json", {"bos_token": None, "eos_token": None}, "neither bos_token nor eos_token"),
        ("tokenizer_config.json", {"bos_token": "<new>"}, r"yields token (\d+), but the model has \1 embedd"),
    ],
    ids=["layers", "memory", "number", "no prefix", "vocabulary"],
)
def test_faults_are_named(name, change, message, folder, fuzzing, offline):
    content = json.dumps(json.loads((folder / name).read_text()) | change).encode()
    with fuzzing.replaced(folder / name, content), pytest.raises(ModelError, match=message):
        score(folder)
