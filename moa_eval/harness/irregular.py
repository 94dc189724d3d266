"""Requests that HFLM cuts or fails at: what is scored instead, and how many there were."""

from collections import Counter
from collections.abc import Set
from typing import NamedTuple

from moa_eval.harness.prefix_tree import Request, truncated

TRUNCATION = ("left", "skip", "error")
KINDS = {
    "context_truncated": "context cut from the left to max_length={max_length}, BOS and beginning lost, as by hf",
    "continuation_truncated": "continuation longer than max_length={max_length}, only its last tokens scored",
    "skipped": "longer than max_length={max_length} and not scored (log-likelihood -inf), by truncation=skip",
    "empty": "continuation without a token, not scored (log-likelihood -inf)",
    "merged": "continuation that begins within the context's last token, scored from that token on",
}


class Irregular(NamedTuple):
    """A kind (one of `KINDS`), and the item that it is found in."""

    kind: str
    task: str
    document: int


def fit(request: Request, merged: bool, max_length: int, truncation: str) -> tuple[Request | None, list[str]]:
    """The request as it is to be scored, None if it is not, and its kinds; `truncation` is one of `TRUNCATION`."""
    context, continuation = request
    kinds = ["merged"] if merged else []
    if not continuation:
        return None, ["empty"]
    if len(context) + len(continuation) <= max_length + 1:
        return request, kinds
    if truncation == "skip":
        return None, ["skipped"]
    kinds.append("context_truncated" if len(continuation) <= max_length else "continuation_truncated")
    return truncated(request, max_length), kinds


def counts(items: Set[Irregular]) -> dict[str, dict[str, int]]:
    """How many items of each task are of each kind."""
    tasks = sorted({item.task for item in items})
    return {task: dict(Counter(item.kind for item in sorted(items) if item.task == task)) for task in tasks}


def warnings(items: Set[Irregular], max_length: int) -> list[str]:
    """A line for each kind: what it means, how many items of which task, and the first of them."""
    lines = []
    for kind, meaning in KINDS.items():
        own = sorted(item for item in items if item.kind == kind)
        if own:
            tasks = ", ".join(f"{task} {count}" for task, count in Counter(item.task for item in own).items())
            first = f"first: {own[0].task}, doc_id {own[0].document}"
            lines.append(f"{meaning.format(max_length=max_length)}; items: {tasks} ({first})")
    return lines
