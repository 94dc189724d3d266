"""Log-likelihoods of many continuations with shared prefixes computed once; independent of lm-eval.

Requests become token trees (`prefix_tree`). Several trees of similar size are packed into one row of tokens without
padding, so that embeddings, norms, linear layers and routers compute exactly the positions needed; only attention
separates the trees (`tree_attention`). Position ids are depths in the tree, so rotary and learned positions are those
of the plain text. The head computes logits only for positions that score something, and log-softmax runs in float32
over a few rows at a time.

This is exact for models in which only attention mixes positions. `PrefixTreeScorer.unsupported_reason` tests that by
comparing a few short trees with the model's own forward pass, and reads from the config from which length on attention
windows or position scaling matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moa_eval.harness.prefix_tree import Request, Segment, batches, plan, truncated
from moa_eval.harness.tree_attention import NotPackableError, Packing, packed
from moa_lm.transformers_internals import uses_attention_interface

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2}
"""Largest disagreement with the model's own forward pass that rounding explains, relative to the spread of scores."""
TOLERANCE_LOW_PRECISION = 1e-1


class Limits(NamedTuple):
    """What one batch may hold on a kind of device if the batch size is automatic."""

    tokens: int
    logit_bytes: int
    softmax_bytes: int


CPU_LIMITS = Limits(1024, 48 * 2**20, 8 * 2**20)
"""Logits of one or two sequences of HFLM."""
GPU_LIMITS = Limits(16384, 512 * 2**20, 128 * 2**20)
"""Positions that fill the device, logits of a fraction of HFLM's batch."""


class Score(NamedTuple):
    """Result of request number `request`: log-probability of its continuation, and whether greedy decoding gives it."""

    request: int
    log_probability: float
    is_greedy: bool


class _Launched:
    """A batch whose results are being copied to the host, so that the next one can start before they are read."""

    def __init__(self, packing: Packing, result: Tensor) -> None:
        self.requests, self.counts = packing.requests, packing.counts
        self.host = result.to("cpu", non_blocking=result.is_cuda)
        self.copied = None
        if result.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(result.device))

    def scores(self) -> Iterator[Score]:
        """Wait for the results; yield one score per request."""
        if self.copied is not None:
            self.copied.synchronize()
        parts = self.host.double().split(self.counts, dim=1)
        for request, (log_probabilities, greedy) in zip(self.requests, parts, strict=True):
            yield Score(request, log_probabilities.sum().item(), bool(greedy.all()))


class PrefixTreeScorer:
    """Scorer of continuations by a causal language model of transformers.

    Args:
        model: The model, which may be wrapped by an adapter of peft.
        device: Device of the model's inputs.
        max_length: Number of positions that the model can read.
        batch_size: 1 or "auto" choose batches that fill the device and keep logits small. A larger number bounds a
            batch by the positions and logit rows of that many requests as long as the longest, which is at most what
            HFLM holds at this batch size. Scores do not depend on it beyond rounding.
        softmax_dtype: Dtype of log-softmax (default: float32).
        autocast_dtype: Dtype of autocast (default: no autocast).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        max_length: int,
        batch_size: int | str = 1,
        softmax_dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.max_length, self.batch_size = max_length, batch_size
        self.softmax_dtype = softmax_dtype or torch.float32
        self.autocast_dtype = autocast_dtype
        get_base_model = getattr(model, "get_base_model", None)  # of a peft adapter
        self.base: Any = get_base_model() if callable(get_base_model) else model

    # ---- scoring ------------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request]) -> Iterator[Score]:
        """Score every request; yield results batch by batch, in arbitrary order.

        Requests must fit `max_length` (`prefix_tree.truncated`), and `unsupported_reason` of the longest must be None.
        Results of a batch are read while the next one runs.
        """
        longest = max((len(request.context) + len(request.continuation) - 1 for request in requests), default=0)
        max_tokens, max_rows = self.batch_limits(longest)
        segments = plan(requests, self._pairs_per_position(), max_tokens)
        running: list[_Launched] = []
        for chosen in batches(segments, max_tokens, max_rows):
            launched = self._launch(chosen)
            for batch in running:
                yield from batch.scores()
            running = launched
        for batch in running:
            yield from batch.scores()

    def batch_limits(self, longest: int) -> tuple[int, int]:
        """Return the positions and logit rows that a batch may hold, for requests of at most `longest` positions."""
        if isinstance(self.batch_size, int) and self.batch_size > 1:
            return self.batch_size * longest, self.batch_size * longest
        weight = getattr(self.base.get_output_embeddings(), "weight", None)
        vocabulary = weight.shape[0] if weight is not None else self.base.config.get_text_config().vocab_size
        row = vocabulary * (self.autocast_dtype or self.base.dtype).itemsize
        return self._limits.tokens, self._limits.logit_bytes // row

    @property
    def _limits(self) -> Limits:
        return CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS

    def _pairs_per_position(self) -> float:
        """Return the number of attention pairs that take as long as the rest of the model for one position.

        A layer takes 24 d^2 operations per position (12 d^2 weights) and 4 d per pair: 6 d pairs at equal speed.
        Attention runs at about a quarter of the speed of matrix products.
        """
        return 1.5 * self.base.get_input_embeddings().embedding_dim

    def _launch(self, segments: list[Segment]) -> list[_Launched]:
        """Start a batch; if memory is insufficient, start two halves."""
        packing = Packing(segments, self.device)
        try:
            return [_Launched(packing, self._forward(packing))]
        except torch.OutOfMemoryError:
            if len(segments) == 1:
                raise
        del packing  # its masks
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # fragments of the failed attempt
        half = len(segments) // 2
        return self._launch(segments[:half]) + self._launch(segments[half:])

    @torch.inference_mode()
    def _forward(self, packing: Packing) -> Tensor:
        """Return (2, P) float32: log-probability of each scored token, and 1 where it has the highest logit."""
        batch = packing.tensors
        with packed(self.base, packing), self._autocast():
            logits = self.model(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.kept,
            ).logits[0]
        row, target = batch.row.to(logits.device), batch.target.to(logits.device)
        step = max(1, self._limits.softmax_bytes // (4 * logits.shape[-1]))
        parts = [(rows.to(self.softmax_dtype).logsumexp(-1), rows.argmax(-1)) for rows in logits.split(step)]
        normalizer, best = (torch.cat(part) for part in zip(*parts, strict=True))
        score = logits[row, target].to(self.softmax_dtype) - normalizer[row]
        return torch.stack((score.float(), (best[row] == target).float()))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    # ---- supported models ---------------------------------------------------------------------------------------

    def unsupported_reason(self, length: int) -> str | None:
        """Return why texts of `length` tokens cannot be scored exactly, or None. The first call runs the model."""
        return next((reason for limit, reason in self._unsupported if length > limit), None)

    @cached_property
    def _unsupported(self) -> list[tuple[int, str]]:
        """Reasons why texts longer than a limit cannot be scored exactly."""
        if not isinstance(self.base, PreTrainedModel):
            return [(-1, "it is not a transformers model")]
        parameters = inspect.signature(self.base.forward).parameters
        if missing := [name for name in ("position_ids", "logits_to_keep") if name not in parameters]:
            return [(-1, f"its forward pass does not take {' or '.join(missing)}")]
        if not uses_attention_interface(self.base):
            return [(-1, "its attention does not use transformers' attention interface")]
        return self._compare_with_plain()

    def _compare_with_plain(self) -> list[tuple[int, str]]:
        """Compare packed trees with the model's own forward pass, text by text."""
        config = self.base.config.get_text_config(decoder=True)
        windows = _declared_windows(config)
        requests = self._check_requests(max([window + 16 for window in windows if window <= 256], default=40))
        packing = Packing(plan(requests, pairs_per_position=64, max_tokens=10_000), self.device)
        try:
            ours = self._forward(packing)[0].float().cpu()
            theirs = torch.cat([self._plain(requests[index]) for index in packing.requests])
        except torch.OutOfMemoryError:
            raise
        except NotPackableError as error:
            return [(-1, str(error))]
        except Exception as error:  # anything that an unknown model raises for an unusual input
            return [(-1, f"it raises {error!r} for packed texts")]
        if not packing.calls:
            return [(-1, "its attention does not use transformers' attention interface")]
        dtype = self.autocast_dtype or self.base.dtype
        exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        allowed = TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION) if exact else TOLERANCE_LOW_PRECISION
        # relative to the spread of the scores, which is small for untrained models
        error = (ours - theirs).abs().quantile(0.9).item() / max(theirs.std().item(), 1e-12)
        if not error <= allowed and theirs.isfinite().all():
            return [(-1, f"packed texts have different scores from plain ones (relative difference {error:.1e})")]
        reasons = [
            (window, f"its config declares a window of {window} tokens that it does not pass to attention")
            for window in sorted(windows - packing.windows)
        ]
        if (limit := _rescaled_beyond(config)) is not None:
            reasons.append((limit, f"its rotary scaling depends on the longest text of a batch beyond {limit} tokens"))
        return reasons

    def _check_requests(self, length: int) -> list[Request]:
        """Return random trees that branch early, late and twice, a chain of `length` tokens, and duplicates."""
        vocabulary = self.base.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, (length + 60,), generator=torch.Generator().manual_seed(0)).tolist()
        answers = [tokens[20:25], tokens[20:23] + tokens[30:32], tokens[40:41], tokens[20:25]]
        requests = [Request(tokens[:12], answer) for answer in answers]
        requests += [Request(tokens[50:53], tokens[53:55]), Request(tokens[-length:-5], tokens[-5:])]
        return [truncated(request, self.max_length) for request in requests]

    @torch.inference_mode()
    def _plain(self, request: Request) -> Tensor:
        """Return log-probabilities of a continuation's tokens by the model's own forward pass."""
        sequence = torch.tensor([*request.context, *request.continuation], device=self.device)
        with self._autocast():
            logits = self.model(input_ids=sequence[None, :-1], use_cache=False).logits[0]
        count = len(request.continuation)
        rows = functional.log_softmax(logits[-count:], dim=-1, dtype=self.softmax_dtype)
        return rows.gather(1, sequence[-count:, None].to(rows.device))[:, 0].float().cpu()


def _declared_windows(config: Any) -> set[int]:
    """Return attention windows or chunks that a config declares, whether or not a layer uses them."""
    types = getattr(config, "layer_types", None)
    if types and all(kind == "full_attention" for kind in types):
        return set()
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window", "attn_window_size")
    return {value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0}


def _rescaled_beyond(config: Any) -> int | None:
    """Return the length beyond which rotary frequencies depend on the longest text of the batch, if they do."""
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [
        entry.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", 0))
        for entry in (rope, *rope.values())
        if isinstance(entry, dict) and entry.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)
