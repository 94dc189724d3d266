"""Tiny models, tokenizers and data sets."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer
from transformers.utils import logging

from moa_lm import MoALlamaConfig, MoALlamaForCausalLM
from moa_lm.token_shards import TokenSettings, make_tokens

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that logits differ visibly
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable progress bars and restore transformers' verbosity."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def tiny() -> Callable[..., MoALlamaForCausalLM]:
    """tiny(**fields) -> a small MoALlamaForCausalLM in evaluation mode, seeded."""

    def make(**fields: Any) -> MoALlamaForCausalLM:
        torch.manual_seed(0)
        return MoALlamaForCausalLM(MoALlamaConfig(**{**TINY, **fields})).eval()

    return make


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """llama(**fields) -> transformers' own model of the same size."""

    def make(**fields: Any) -> LlamaForCausalLM:
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**TINY, **fields})).eval()

    return make


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """tokens(*shape) -> reproducible token ids of TINY's vocabulary, without special tokens."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of 70 words and an end token."""
    words = {"<|end|>": 0, **{f"w{i}": i for i in range(1, 70)}}
    inner = Tokenizer(WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", unk_token="w1")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(params=["template", "llama", "t5"])
def adding_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a tokenizer that begins a text with <s> (1) or ends it with </s> (2), its end-of-text token."""
    pieces = {"▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7, "▁ab": 8}
    folder = tmp_path / "adding"
    if request.param == "template":
        inner = Tokenizer(WordLevel({**SPECIAL, "a": 3, "b": 4, "ab": 5}, unk_token="<unk>"))
        inner.pre_tokenizer = Whitespace()
        inner.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL["<s>"])]
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    elif request.param == "llama":
        merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
        LlamaTokenizer(vocab={**SPECIAL, **pieces}, merges=merges, add_bos_token=True).save_pretrained(folder)
    else:
        scores = [(piece, -float(number)) for piece, number in {**SPECIAL, **pieces}.items()]
        T5Tokenizer(vocab=scores, extra_ids=0, pad_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets train/ and val/: 400 short documents, a tenth held out."""
    folder = tmp_path_factory.mktemp("tokens")
    words = ("king", "had", "daughter", "more", "beautiful", "than", "other", "sea")
    texts = [" ".join(words[(n * k) % 8] for k in range(1, 21)) + f" {n}." for n in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_tokens([str(folder / "text.jsonl")], folder / "set", TokenSettings(train_bpe=300, val_fraction=0.1))
    return folder / "set"


@pytest.fixture
def script() -> Callable[[str], Callable[..., int]]:
    """script(name) -> the function `main` of scripts/NAME.py."""

    def load(name: str) -> Callable[..., int]:
        path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_script", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load
