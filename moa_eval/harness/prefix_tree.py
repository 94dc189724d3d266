"""Scoring requests -> token trees -> packed batches. Host side only: numpy, no model.

Requests that begin alike share the positions of their common prefix, whoever they belong to: the four answers of a
question, WinoGrande's two sentences up to the option, duplicates, few-shot examples in front of several questions.
Sorted by their tokens, requests with a common prefix are neighbours, so that one pass builds every tree: a request
adds what follows its longest common prefix with the one before it.

A tree is kept in depth-first order. Position `i` then attends to `j` exactly if `j` comes no later and lies on the
path of `i` to the root, that is, if `j <= i < end[j]` where `end[j]` is where the subtree of `j` ends. One integer a
position says what a (T, T) mask would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Request(NamedTuple):
    """Token ids of a context, and of the continuation to score after it; neither may be empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass
class Segment:
    """One packed token tree of T positions, in depth-first order.

    tokens, depth and end are (T,): the token, its position id, and the end of its subtree. Request `requests[k]`
    reads the logits of the positions `rows[k]` and scores the tokens `targets[k]` there.
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
        """Whether nothing branches, so that plain causal attention is right."""
        return bool((self.end == len(self)).all())


@dataclass
class _Growing:
    """A tree under construction."""

    tokens: list[Ints] = field(default_factory=list)
    depth: list[Ints] = field(default_factory=list)
    closed: list[tuple[Ints, int]] = field(default_factory=list)
    path: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    size: int = 0
    requests: list[int] = field(default_factory=list)
    rows: list[Ints] = field(default_factory=list)
    targets: list[Ints] = field(default_factory=list)

    def add(self, index: int, sequence: Ints, shared: int, scored: int) -> None:
        """Append a request: `sequence` with its last token, of which `shared` lead along the current path."""
        inputs = sequence[:-1]
        added = np.arange(self.size, self.size + len(inputs) - shared)
        self.closed.append((self.path[shared:], self.size))
        self.path = np.concatenate((self.path[:shared], added))
        self.tokens.append(inputs[shared:])
        self.depth.append(np.arange(shared, len(inputs)))
        self.size += len(added)
        self.requests.append(index)
        self.rows.append(self.path[len(inputs) - scored : len(inputs)])
        self.targets.append(sequence[len(sequence) - scored :])

    def finish(self) -> Segment:
        end = np.full(self.size, self.size)
        for nodes, time in self.closed:
            end[nodes] = time
        rows = len(np.unique(np.concatenate(self.rows)))
        tokens, depth = np.concatenate(self.tokens), np.concatenate(self.depth)
        return Segment(tokens, depth, end, self.requests, self.rows, self.targets, rows)


def truncated(request: Request, max_length: int) -> Request:
    """The last `max_length + 1` tokens, as lm-eval's HFLM cuts them: the model reads all but the last one.

    Of a continuation of more than `max_length` tokens, for which HFLM fails, the last `max_length` are scored.
    """
    tokens = [*request.context, *request.continuation][-(max_length + 1) :]
    scored = min(len(request.continuation), max_length)
    return Request(tokens[:-scored], tokens[-scored:])


def common_prefix(first: Ints, second: Ints) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def plan(requests: Sequence[Request], pairs_per_position: float, max_tokens: int) -> list[Segment]:
    """Token trees that together score every request once, the largest first.

    A request joins the tree of its predecessor if that is cheaper than a tree of its own: the positions it shares are
    worth `pairs_per_position` attention pairs each, and a tree of T positions has T * T of them. No tree grows past
    `max_tokens`, unless a single request is longer than half of it: then two of them still fit.
    """
    assert all(len(context) and len(continuation) for context, continuation in requests)
    sequences = [np.array([*context, *continuation], dtype=np.int64) for context, continuation in requests]
    # big-endian bytes compare as the tokens do; the unread last token is no part of the key
    keys = [sequence[:-1].astype(">i4").tobytes() for sequence in sequences]
    segments: list[Segment] = []
    tree, previous = _Growing(), np.empty(0, np.int64)
    for index in sorted(range(len(requests)), key=keys.__getitem__):
        sequence = sequences[index]
        inputs = sequence[:-1]
        shared = common_prefix(previous, inputs)
        size = tree.size + len(inputs) - shared
        more_pairs = size**2 - tree.size**2 - len(inputs) ** 2
        joins = shared and size <= max(max_tokens, 2 * len(inputs)) and more_pairs <= shared * pairs_per_position
        if tree.size and not joins:
            segments.append(tree.finish())
            tree, shared = _Growing(), 0
        tree.add(index, sequence, shared, len(requests[index].continuation))
        previous = inputs
    if tree.size:
        segments.append(tree.finish())
    return sorted(segments, key=len, reverse=True)


@dataclass
class Batch:
    """Segments laid end to end, as the model and the attention function need them. All arrays are int64.

    tokens, positions (N,): the row for the model. gather (G * Tmax,): where each slot of the padded attention reads
    its position (0 in the padding); slots (N,): the way back. end (G, Tmax): the trees, a padding slot seen by itself
    alone. kept (R,): positions whose logits are needed. row, target (P,): which kept row scores which token, request
    after request; `requests` names them and `counts` says how many tokens each has.
    """

    tokens: Ints
    positions: Ints
    gather: Ints
    slots: Ints
    end: Ints
    kept: Ints
    row: Ints
    target: Ints
    requests: list[int]
    counts: Ints
    is_chain: bool

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int(self.positions.max()) + 1


def pack(segments: Sequence[Segment], multiple_of: int = 1) -> Batch:
    """Lay segments end to end; the padded attention length is rounded up to `multiple_of`."""
    sizes = [len(segment) for segment in segments]
    starts = np.cumsum([0, *sizes[:-1]])
    padded = -(-max(sizes) // multiple_of) * multiple_of
    gather = np.zeros((len(segments), padded), np.int64)
    end = np.tile(np.arange(1, padded + 1), (len(segments), 1))
    slots = []
    for number, (segment, start, size) in enumerate(zip(segments, starts, sizes, strict=True)):
        gather[number, :size] = np.arange(start, start + size)
        end[number, :size] = segment.end
        slots.append(np.arange(number * padded, number * padded + size))
    rows = [row + start for segment, start in zip(segments, starts, strict=True) for row in segment.rows]
    targets = [target for segment in segments for target in segment.targets]
    kept, row = np.unique(np.concatenate(rows), return_inverse=True)
    return Batch(
        tokens=np.concatenate([segment.tokens for segment in segments]),
        positions=np.concatenate([segment.depth for segment in segments]),
        gather=gather.ravel(),
        slots=np.concatenate(slots),
        end=end,
        kept=kept,
        row=row.reshape(-1),
        target=np.concatenate(targets),
        requests=[request for segment in segments for request in segment.requests],
        counts=np.array([len(target) for target in targets]),
        is_chain=all(segment.is_chain for segment in segments),
    )


def batches(segments: Sequence[Segment], max_tokens: int, max_rows: int) -> Iterator[list[Segment]]:
    """Consecutive segments of at most `max_tokens` positions and `max_rows` logit rows together, one at least."""
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
