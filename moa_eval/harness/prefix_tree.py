"""Scoring requests as token trees; numpy only, without a model.

Requests with a common beginning share its positions, whether they are answers to one question, WinoGrande's two
sentences up to the option, duplicates, or questions after the same few-shot examples. Sorted by their tokens, requests
with a common prefix are neighbours, so one pass builds all trees: a request adds what follows its longest common prefix
with the previous one.

Trees are stored in depth-first order. Position `i` attends to `j` if `j` lies on the path from the root to `i`, that
is, if `j <= i < end[j]`, where `end[j]` is the end of the subtree of `j`. One integer per position replaces a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Request(NamedTuple):
    """Token ids of a context and of the continuation to score after it; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass
class Segment:
    """One token tree of T positions, in depth-first order.

    Attributes:
        tokens, depth, end: (T,) token, position id, and end of the subtree of each position.
        requests, rows, targets: Indices of the requests, the positions whose logits each one reads, and the tokens
            that it scores there.
        logit_rows: Number of distinct positions in `rows`.
    """

    tokens: Ints
    depth: Ints
    end: Ints
    requests: list[int]
    rows: list[Ints]
    targets: list[Ints]
    logit_rows: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether the tree has no branches, so that causal attention is exact."""
        return bool((self.end == len(self)).all())


class _Member(NamedTuple):
    """A request in a tree: its tokens, how many it shares with the previous member, and how many it scores."""

    request: int
    sequence: Ints
    shared: int
    scored: int


def truncated(request: Request, max_length: int) -> Request:
    """Return the last `max_length + 1` tokens, as HFLM truncates; the model does not read the last one.

    Of a continuation longer than `max_length`, at which HFLM fails, the last `max_length` tokens are scored.
    """
    tokens = [*request.context, *request.continuation][-(max_length + 1) :]
    scored = min(len(request.continuation), max_length)
    return Request(tokens[:-scored], tokens[-scored:])


def plan(requests: Sequence[Request], pairs_per_position: float, max_tokens: int) -> list[Segment]:
    """Return token trees that together score every request once, the largest first.

    A request joins the previous tree if that is cheaper than a new one: a shared position saves as much as
    `pairs_per_position` attention pairs, and a tree of T positions has T * T pairs. A tree has at most `max_tokens`
    positions, or the length of two requests where a single one is longer than half of that.
    """
    sequences = [np.array([*context, *continuation], dtype=np.int64) for context, continuation in requests]
    # big-endian bytes sort like the tokens; the last token is not read and not part of the key
    keys = [sequence[:-1].astype(">i4").tobytes() for sequence in sequences]
    trees: list[list[_Member]] = []
    tree_size, previous = 0, np.empty(0, np.int64)
    for index in sorted(range(len(requests)), key=keys.__getitem__):
        inputs = sequences[index][:-1]
        shared = _common_prefix(previous, inputs)
        size = tree_size + len(inputs) - shared
        more_pairs = size**2 - tree_size**2 - len(inputs) ** 2
        if not (shared and size <= max(max_tokens, 2 * len(inputs)) and more_pairs <= shared * pairs_per_position):
            trees.append([])
            shared, size = 0, len(inputs)
        trees[-1].append(_Member(index, sequences[index], shared, len(requests[index].continuation)))
        tree_size, previous = size, inputs
    return sorted(map(_segment, trees), key=len, reverse=True)


def _common_prefix(first: Ints, second: Ints) -> int:
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def _segment(members: Sequence[_Member]) -> Segment:
    """Lay out a tree in depth-first order."""
    size = sum(len(member.sequence) - 1 - member.shared for member in members)
    tokens, depth, end = (np.full(size, size) for _ in range(3))
    rows, path, used = [], np.empty(0, np.int64), 0
    for _, sequence, shared, scored in members:
        read = len(sequence) - 1
        added = np.arange(used, used + read - shared)
        end[path[shared:]] = used  # the branch that the previous member left ends here
        path = np.concatenate((path[:shared], added))
        tokens[added], depth[added] = sequence[shared:-1], np.arange(shared, read)
        rows.append(path[read - scored :])
        used += len(added)
    targets = [member.sequence[len(member.sequence) - member.scored :] for member in members]
    logit_rows = len(np.unique(np.concatenate(rows)))
    return Segment(tokens, depth, end, [member.request for member in members], rows, targets, logit_rows)


def batches(segments: Sequence[Segment], max_tokens: int, max_rows: int) -> Iterator[list[Segment]]:
    """Yield groups of at least one consecutive segment, with at most `max_tokens` positions and `max_rows` rows."""
    chosen: list[Segment] = []
    tokens = rows = 0
    for segment in segments:
        if chosen and (tokens + len(segment) > max_tokens or rows + segment.logit_rows > max_rows):
            yield chosen
            chosen, tokens, rows = [], 0, 0
        chosen.append(segment)
        tokens += len(segment)
        rows += segment.logit_rows
    if chosen:
        yield chosen
