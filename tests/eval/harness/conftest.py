"""Models, tokenizers and data sets of the harness's tests."""

from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moa_eval.harness import MoALM
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

ITEMS = Path(__file__).parents[1] / "items"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE trained on the items, without special tokens by default."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    bpe.train([str(path) for path in sorted(ITEMS.rglob("*.jsonl"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Folders with random weights: two that trees are exact for, and one that is scored by HFLM's code."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "moa": MoALlamaForCausalLM(MoALlamaConfig(**SIZES, ffn_variant="qdmoa")),
        "bloom": BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def both(checkpoints):
    """HFLM and MoALM of the same checkpoint."""
    return tuple(cls(str(checkpoints / "llama"), device="cpu", dtype="float32") for cls in (HFLM, MoALM))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """lm-eval's task files find ITEMS as their data sets, without a network."""
    monkeypatch.chdir(ITEMS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
