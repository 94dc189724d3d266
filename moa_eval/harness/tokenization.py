"""Tokenization of (context, continuation) pairs as lm-eval's HFLM does it, batched and without repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from moa_eval.harness.loading import ModelError
from moa_eval.harness.prefix_tree import Request

CALL = 2048
"""Strings per call of the tokenizer: enough for its threads, little memory."""


class PairTokenizer:
    """Tokenizer of (context, continuation) pairs; every distinct string is tokenized once.

    `prefix_token_id` stands for an empty context, if there is such a token. `add_bos_token` is HFLM's argument; None
    leaves it to the tokenizer.
    """

    def __init__(self, tokenizer: Any, prefix_token_id: int | None, add_bos_token: bool | None) -> None:
        self.tokenizer, self.prefix_token_id, self.add_bos_token = tokenizer, prefix_token_id, add_bos_token
        self.prefix = None if prefix_token_id is None else tokenizer.decode(prefix_token_id)

    def encode(self, pairs: Sequence[tuple[str, str]], bar: tqdm) -> list[tuple[Request, bool]]:
        """Return the tokens of each pair, and whether its two strings share a token.

        Spaces at the end of a context belong to the continuation, which is what the joint text has beyond the number of
        the context's tokens. If nothing is left, the continuation begins within the context's last token; that token
        and the following ones are its tokens then.
        """
        split = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            split.append((stripped, context[len(stripped) :] + continuation) if context else (None, continuation))
        joint = dict.fromkeys(
            part for context, rest in split if context is not None for part in (context, context + rest)
        )
        begun = [text for text in joint if self.prefix is not None and text.startswith(self.prefix)]
        others = [text for text in joint if self.prefix is None or not text.startswith(self.prefix)]
        ids = self._encode(others, self.add_bos_token, bar) | self._encode(begun, False, bar)
        alone = self._encode(list(dict.fromkeys(rest for context, rest in split if context is None)), False, bar)
        return [
            self._pair([], alone[rest], rest)
            if context is None
            else self._pair(ids[context], ids[context + rest], rest)
            for context, rest in split
        ]

    def _pair(self, context: list[int], whole: list[int], rest: str) -> tuple[Request, bool]:
        merged = whole != context and len(whole) <= len(context)
        if merged:
            context = whole[: self._first_token_of(rest, whole)]
        if context:
            return Request(context, whole[len(context) :]), merged
        prefix = self.prefix_token_id
        if prefix is None:
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither bos_token nor eos_token, which stands for "
                "an empty context: pass custom_prefix_token_id=ID"
            )
        return Request([prefix], whole[1:] if whole[:1] == [prefix] else whole), merged

    def _first_token_of(self, ending: str, tokens: list[int]) -> int:
        """Return the index of the token in which the text's ending begins."""
        begin = len(tokens) - 1
        while begin > 0 and len(self.tokenizer.decode(tokens[begin:])) < len(ending):
            begin -= 1
        return max(begin, 0)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool | None, bar: tqdm) -> dict[str, list[int]]:
        arguments = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        encoded: dict[str, list[int]] = {}
        for start in range(0, len(texts), CALL):
            part = texts[start : start + CALL]
            # not verbose: long requests are reported as irregular items
            ids = self.tokenizer(part, return_attention_mask=False, verbose=False, **arguments)["input_ids"]
            encoded |= zip(part, ids, strict=True)
            bar.update(len(part))
        return encoded
