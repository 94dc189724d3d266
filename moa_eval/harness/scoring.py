"""Log-likelihoods of many continuations, shared prefixes computed once. Knows torch and transformers, not lm_eval.

Requests become token trees (`prefix_tree.py`); several trees, alike in size, are laid end to end in ONE row of
tokens without padding, so that embeddings, norms, linear layers and routers see exactly the positions needed. Only
attention takes the trees apart (`tree_attention.py`). Position ids are depths in the tree, so that rotary and
learned positions are those of the plain text. The head computes logits for the positions that score something, and
log-softmax runs in float32 over a few rows at a time.

This is exact for models whose layers other than attention treat positions independently. Whether a model is one of
them is not believed but tried: `PrefixTreeScorer.refusal` compares a few short trees with the model's own forward
pass, and reads from the config beyond which length attention windows or position scalings would matter.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moa_eval.harness.prefix_tree import Batch, Request, Segment, batches, pack, plan, truncated
from moa_eval.harness.tree_attention import NotPackableError, Packing, packed
from moa_lm.transformers_internals import uses_attention_interface

# What one batch may hold if the batch size is left to us. Enough positions to fill the processor; logits of this many
# bytes are what HFLM holds for one or two sequences on a CPU, and for a fraction of its batch on a GPU.
AUTO_TOKENS = {"cpu": 1024}
AUTO_LOGIT_BYTES = {"cpu": 48 * 2**20}
AUTO_TOKENS_DEVICE, AUTO_LOGIT_BYTES_DEVICE = 16384, 512 * 2**20
SOFTMAX_BYTES = {"cpu": 8 * 2**20}
SOFTMAX_BYTES_DEVICE = 128 * 2**20
# Relative disagreement with the model's own forward pass that rounding explains; a wrong mask is far above.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2}
TOLERANCE_OTHERWISE = 1e-1


class Score(NamedTuple):
    """Result of request number `request`: log-probability of its continuation; whether greedy decoding gives it."""

    request: int
    log_probability: float
    is_greedy: bool


def _fetch(result: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the function returned waits for that copy, not for work queued after it."""
    if result.device.type != "cuda":
        return result.cpu
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(result.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def _declared_windows(config: Any) -> set[int]:
    """Attention windows or chunks that a config names, whether or not a layer passes them on."""
    types = getattr(config, "layer_types", None)
    if types and all(kind == "full_attention" for kind in types):
        return set()
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window", "attn_window_size")
    return {value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0}


def _rescaled_beyond(config: Any) -> int | None:
    """Length from which rotary frequencies depend on the longest text of the batch, if they ever do."""
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [
        entry.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", 0))
        for entry in (rope, *rope.values())
        if isinstance(entry, dict) and entry.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


class PrefixTreeScorer:
    """Scores continuations with a transformers causal language model.

    `max_length`: positions the model can read. `batch_size`: 1 or "auto" let the
    scorer choose a batch that fills the device and whose logits stay small; a larger number allows a batch the
    positions and logit rows of that many sequences as long as the longest request, never more than HFLM holds at that
    batch size. Scores do not depend on it beyond rounding. `softmax_dtype` and `autocast_dtype` are HFLM's
    `softmax_dtype` (float32 if None) and `mixed_precision_dtype`.
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
        inner = getattr(model, "get_base_model", None)  # below an adapter of the peft library
        self.base: Any = inner() if callable(inner) else model
        self._reason: str | None = None
        self._limits: list[tuple[int, str]] | None = None

    # ---- which models -------------------------------------------------------------------------------------------

    def refusal(self, depth: int) -> str | None:
        """Why texts of `depth` tokens cannot be scored exactly here, or None if they can. Slow at the first call."""
        if self._limits is None:
            self._limits = []
            self._reason = self._unsupported() or self._disagreement()
        if self._reason:
            return self._reason
        return next((why for limit, why in self._limits if depth > limit), None)

    def _unsupported(self) -> str | None:
        if not isinstance(self.base, PreTrainedModel):
            return "it is not a transformers model"
        parameters = inspect.signature(self.base.forward).parameters
        missing = [name for name in ("position_ids", "logits_to_keep") if name not in parameters]
        if missing:
            return f"its forward pass takes no {' and no '.join(missing)}"
        if not uses_attention_interface(self.base):
            return "its attention does not go through transformers' attention interface"
        return None

    def _disagreement(self) -> str | None:
        """Compare packed trees with the model's own forward pass, text by text."""
        config = self.base.config.get_text_config(decoder=True)
        windows = _declared_windows(config)
        requests = self._check_requests(max([window + 16 for window in windows if window <= 256], default=40))
        segments = plan(requests, pairs_per_position=64, max_tokens=10_000)
        batch = pack(segments)
        try:
            packing = Packing(batch, self.device)
            ours = self._forward(packing)[0].float().cpu()
            theirs = torch.cat([self._plain(requests[index]) for index in batch.requests])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an unknown model does with an unusual input is a reason not to use it
            return str(error) if isinstance(error, NotPackableError) else f"a packed row made it raise {error!r}"
        if not packing.calls:
            return "its attention does not go through transformers' attention interface"
        dtype = self.autocast_dtype or self.base.dtype
        exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        allowed = TOLERANCE.get(dtype, TOLERANCE_OTHERWISE) if exact else TOLERANCE_OTHERWISE
        # relative to how much the scores vary: an untrained model's hardly do
        error = (ours - theirs).abs().quantile(0.9).item() / max(theirs.std().item(), 1e-12)
        if not error <= allowed and torch.isfinite(theirs).all():
            return f"packed texts give it other scores than plain ones (relative difference {error:.1e})"
        self._limits = [
            (window, f"its config declares a window of {window} tokens that its attention is not told of")
            for window in sorted(windows - packing.windows)
        ]
        if (limit := _rescaled_beyond(config)) is not None:
            self._limits.append((limit, f"its rotary scaling depends on the longest text beyond {limit} tokens"))
        return None

    def _check_requests(self, length: int) -> list[Request]:
        """Trees that branch early, late and twice, a chain of `length` tokens, duplicates; random tokens."""
        vocabulary = self.base.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, (length + 60,), generator=torch.Generator().manual_seed(0)).tolist()
        answers = [tokens[20:25], tokens[20:23] + tokens[30:32], tokens[40:41], tokens[20:25]]
        requests = [Request(tokens[:12], answer) for answer in answers]
        requests += [Request(tokens[50:53], tokens[53:55]), Request(tokens[-length:-5], tokens[-5:])]
        return [truncated(request, self.max_length) for request in requests]

    @torch.inference_mode()
    def _plain(self, request: Request) -> Tensor:
        """Log-probabilities of a continuation's tokens by the model's own forward pass."""
        sequence = torch.tensor([*request.context, *request.continuation], device=self.device)
        with self._autocast():
            logits = self.model(input_ids=sequence[None, :-1], use_cache=False).logits[0]
        count = len(request.continuation)
        rows = functional.log_softmax(logits[-count:], dim=-1, dtype=self.softmax_dtype)
        return rows.gather(1, sequence[-count:, None].to(rows.device))[:, 0].float().cpu()

    # ---- scoring ------------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request]) -> Iterator[Score]:
        """Score every request; results come batch by batch, in an order of the scorer's choosing.

        Requests must fit `max_length` (`prefix_tree.truncated`); ask `refusal` with the longest one first. Results of
        one batch are fetched while the next one runs: one synchronization a batch.
        """
        longest = max((len(request.context) + len(request.continuation) - 1 for request in requests), default=0)
        max_tokens, max_rows = self.limits(longest)
        segments = plan(requests, self._pairs_per_position(), max_tokens)
        waiting: list[tuple[Batch, Callable[[], Tensor]]] = []
        for chosen in batches(segments, max_tokens, max_rows):
            launched = self._launch(chosen)
            yield from self._collect(waiting)
            waiting = launched
        yield from self._collect(waiting)

    def limits(self, longest: int) -> tuple[int, int]:
        """Positions and logit rows that a batch may hold, for requests of at most `longest` positions."""
        if isinstance(self.batch_size, int) and self.batch_size > 1:
            return self.batch_size * longest, self.batch_size * longest
        kind = self.device.type
        head = self.base.get_output_embeddings()
        weight = getattr(head, "weight", None)
        vocabulary = weight.shape[0] if weight is not None else self.base.config.get_text_config().vocab_size
        row = vocabulary * (self.autocast_dtype or self.base.dtype).itemsize
        return AUTO_TOKENS.get(kind, AUTO_TOKENS_DEVICE), AUTO_LOGIT_BYTES.get(kind, AUTO_LOGIT_BYTES_DEVICE) // row

    def _pairs_per_position(self) -> float:
        """Attention pairs that cost as much time as the rest of the model for one position.

        A layer takes 24 d^2 operations a position (12 d^2 weights) and 4 d a pair: 6 d pairs, if attention ran at the
        speed of matrix products. It runs at about a quarter of it.
        """
        return 1.5 * self.base.get_input_embeddings().embedding_dim

    def _launch(self, segments: list[Segment]) -> list[tuple[Batch, Callable[[], Tensor]]]:
        """Start a batch; if the device has too little memory, in halves."""
        batch = pack(segments, multiple_of=1 if self.device.type == "cpu" else 16)
        try:
            result = self._forward(Packing(batch, self.device))
        except torch.OutOfMemoryError:
            if len(segments) == 1:
                raise
        else:
            return [(batch, _fetch(result))]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the failed attempt left in pieces
        half = len(segments) // 2
        return self._launch(segments[:half]) + self._launch(segments[half:])

    def _collect(self, launched: list[tuple[Batch, Callable[[], Tensor]]]) -> Iterator[Score]:
        for batch, result in launched:
            parts = result().double().split(batch.counts.tolist(), dim=1)
            for index, (log_probabilities, greedy) in zip(batch.requests, parts, strict=True):
                yield Score(index, log_probabilities.sum().item(), bool(greedy.all()))

    @torch.inference_mode()
    def _forward(self, packing: Packing) -> Tensor:
        """(2, P) float32: log-probability of each scored token, and 1 where it has the highest logit."""
        tokens, positions, *_, kept, row, target = packing.tensors
        with packed(self.base, packing), self._autocast():
            logits = self.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept
            ).logits[0]
        row, target = row.to(logits.device), target.to(logits.device)
        step = max(1, SOFTMAX_BYTES.get(logits.device.type, SOFTMAX_BYTES_DEVICE) // (4 * logits.shape[-1]))
        parts = [(rows.to(self.softmax_dtype).logsumexp(-1), rows.argmax(-1)) for rows in logits.split(step)]
        normalizer, best = (torch.cat(part) for part in zip(*parts, strict=True))
        score = logits[row, target].to(self.softmax_dtype) - normalizer[row]
        return torch.stack((score.float(), (best[row] == target).float()))

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled)
