"""Texts -> a byte-level BPE tokenizer, as transformers loads it."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

SMALLEST = 257
"""Tokens of a byte-level vocabulary without a merge: 256 bytes and end-of-text."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains GPT-2's kind of tokenizer: its splitting into words, all 256 bytes, merges learned from `texts`.

    The same texts in the same order give the same tokenizer. `<|endoftext|>` (token 0) is both the beginning and the
    end of a text; encoding adds neither.

    Args:
        texts: to learn from; read once.
        vocab_size: number of tokens, at least 257. Texts with too few different words give fewer.

    Raises:
        ValueError: if `vocab_size` is too small.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"train_bpe is {vocab_size}; allowed: {SMALLEST} or more (256 bytes and end-of-text)")
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
