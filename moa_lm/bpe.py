"""Byte-level BPE tokenizers trained on texts, in the format of transformers."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from moa_train.errors import require

END_OF_TEXT = "<|endoftext|>"

MIN_VOCAB_SIZE = 257
"""Size of a byte-level vocabulary without merges: 256 bytes and end-of-text."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer like GPT-2's: its pre-tokenizer, all 256 bytes, and merges learned from `texts`.

    The same texts in the same order give the same tokenizer. `<|endoftext|>` (token 0) is both bos_token and
    eos_token; encoding adds neither.

    Args:
        texts: Training texts; read once.
        vocab_size: Number of tokens, at least 257. Texts with too few different words give fewer.

    Raises:
        ConfigError: `vocab_size` is too small.
    """
    require("train_bpe", vocab_size, vocab_size >= MIN_VOCAB_SIZE, f"{MIN_VOCAB_SIZE} or above")
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    inner.post_processor = ByteLevelProcessor(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
