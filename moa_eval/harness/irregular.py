"""Requests that do not fit or do not tokenize cleanly: how each is scored, and counts by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import NamedTuple

from moa_eval.harness.loading import ModelError
from moa_eval.harness.prefix_tree import Request, truncated

TRUNCATION = ("left", "skip", "error")
KINDS = {
    "context_truncated": "context truncated from the left to max_length={max_length}, without BOS, as by hf",
    "continuation_truncated": "continuation longer than max_length={max_length}, only its last tokens scored",
    "skipped": "request longer than max_length={max_length}, not scored (log-likelihood -inf) by truncation=skip",
    "empty": "continuation without tokens, not scored (log-likelihood -inf)",
    "merged": "continuation that begins within the context's last token, scored from that token on",
}


class Irregular(NamedTuple):
    """A kind (one of `KINDS`), and the item that it occurs in."""

    kind: str
    task: str
    doc_id: int


def fit(request: Request, merged: bool, max_length: int, truncation: str, item: str) -> tuple[Request | None, Set[str]]:
    """Return the request to score (None: do not score it) and the kinds of irregularity; `item` is for messages.

    Raises:
        ModelError: The request is longer than `max_length` and `truncation` is "error".
    """
    context, continuation = request
    kinds = {"merged"} if merged else set()
    if not continuation:
        return None, {"empty"}
    if len(context) + len(continuation) <= max_length + 1:  # the model does not read the last token
        return request, kinds
    if truncation == "skip":
        return None, {"skipped"}
    if truncation == "error":
        raise ModelError(
            f"{item} has {len(context)} tokens of context and {len(continuation)} of continuation, more than "
            f"max_length={max_length}: raise it if the model allows it, lower num_fewshot, or pass truncation=left or "
            "truncation=skip"
        )
    kinds.add("context_truncated" if len(continuation) <= max_length else "continuation_truncated")
    return truncated(request, max_length), kinds


def counts(items: Set[Irregular]) -> dict[str, dict[str, int]]:
    """Return the number of items by task and kind."""
    tasks = sorted({item.task for item in items})
    return {task: dict(Counter(item.kind for item in sorted(items) if item.task == task)) for task in tasks}


def warnings(items: Set[Irregular], max_length: int) -> list[str]:
    """Return a line per kind: its meaning, the number of items by task, and the first item."""
    lines = []
    for kind, meaning in KINDS.items():
        if found := sorted(item for item in items if item.kind == kind):
            tasks = ", ".join(f"{task} {count}" for task, count in Counter(item.task for item in found).items())
            first = f"first: {found[0].task}, doc_id {found[0].doc_id}"
            lines.append(f"{meaning.format(max_length=max_length)}; items: {tasks} ({first})")
    return lines
