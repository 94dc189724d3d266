"""Mixing coefficients and expert loads of a language model on held-out tokens.

FOLDER/mixing/step_XXXXXXXX.json     distribution of the coefficients over the tokens, by layer
FOLDER/experts/step_XXXXXXXX.json    choices of the routers, by layer

Layers are named "model.3"; with experts that means the routed ones, and the shared ones are "model.3.shared".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa_ffn import FFN
from moa_ffn.mixing_stats import mixing_row
from moa_lm.configuration import MoALlamaConfig
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.moe import Experts, MoE
from moa_lm.router import expert_load, load_balancing_loss, router_entropy
from moa_train.atomic_io import write_json

MAX_TOKENS = 4096
"""Largest number of tokens per recording: enough for percentiles, cheap compared with a validation."""

Row = dict[str, Any]


class Watched(NamedTuple):
    """Rows of the two files, one per layer; empty without mixing or without experts."""

    mixing: list[Row]
    experts: list[Row]


@torch.no_grad()
def watch(model: MoALlamaForCausalLM, input_ids: Tensor, position_ids: Tensor | None = None) -> Watched:
    """Run the decoder on tokens and record the statistics of its mixing layers and routers.

    Statistics of routed experts are taken over assignments: a token counts once in each of its k experts, regardless
    of their weights.

    Args:
        model: The bare model; it runs in evaluation mode and returns to its previous mode.
        input_ids: (B, T) tokens on the model's device; as many whole sequences are used as `MAX_TOKENS` allows, but at
            least one.
        position_ids: (B, T) as returned by `document_positions`, with a document mask.

    Returns:
        Mixing rows: see `moa_ffn.mixing_stats.mixing_row`.
        Expert rows: layer, load (fraction of the assignments per expert), entropy (mean over tokens, in nats) and
        max_entropy, balance_loss (1 is perfect balance), assignments (k per token) and dropped (assignments that
        reached no expert).
        Layers with non-finite values have no row.
    """
    rows = max(1, MAX_TOKENS // input_ids.shape[1])
    training = model.training
    model.eval()
    try:
        # A compiled `model(...)` would skip the hooks.
        with _recording(model, sequence_length=input_ids.shape[1]) as found:
            positions = None if position_ids is None else position_ids[:rows]
            model.model(input_ids[:rows], position_ids=positions, use_cache=False)
    finally:
        model.train(training)
    return found


def save(watched: Watched, folder: Path, *, step: int) -> None:
    """Write the rows of both kinds into the folders mixing/ and experts/ of a run; no file where there are none."""
    for name, rows in watched._asdict().items():
        if rows:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_json(folder / name / f"step_{step:08d}.json", {"step": step, "layers": rows})


@contextmanager
def _recording(model: MoALlamaForCausalLM, *, sequence_length: int) -> Iterator[Watched]:
    """Record a row for every call of a mixing FFN, of routed experts and of a router within the context."""
    found = Watched([], [])

    def record_mixing(layer: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FFN | Experts)
        used = _used(module, inputs[0].flatten(0, -2)) if isinstance(module, FFN) else _routed(module, model, *inputs)
        row = mixing_row(layer, module.spec.terms, module.spec.token_adaptive, *used)
        found.mixing.extend([] if row is None else [row])

    def record_router(layer: str, _: nn.Module, __: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        logits, _weights, indices = (values.unflatten(0, (-1, sequence_length)) for values in outputs)
        found.experts.extend(_expert_row(layer, logits, indices))

    handles = []
    for index, block in enumerate(model.model.layers):
        layer, feedforward = f"model.{index}", block.get_submodule("mlp")
        mixing: dict[str, nn.Module | None] = {layer: feedforward}
        if isinstance(feedforward, MoE):
            handles.append(feedforward.router.register_forward_hook(partial(record_router, layer)))
            mixing = {layer: feedforward.experts, f"{layer}.shared": feedforward.shared_experts}
        for name, module in mixing.items():
            if isinstance(module, FFN | Experts) and module.spec.num_coefficients:
                handles.append(module.register_forward_pre_hook(partial(record_mixing, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _used(ffn: FFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients and shares (N, K), float32, of tokens x (N, D)."""
    return ffn.mixing(x).flatten(-2).float(), ffn.shares(x).flatten(-2).float()


def _routed(
    experts: Experts, model: MoALlamaForCausalLM, hidden: Tensor, _: Tensor, indices: Tensor
) -> tuple[Tensor, ...]:
    """Return coefficients and shares (S, K) of the assignments of routed experts with inputs (N, D), (N, k), (N, k)."""
    ffns = (_expert(experts, e, model.config) for e in range(experts.num_experts))
    used = [_used(ffn, hidden[(indices == e).any(-1)]) for e, ffn in enumerate(ffns)]
    return tuple(map(torch.cat, zip(*used, strict=True)))


def _expert(experts: Experts, number: int, config: MoALlamaConfig) -> FFN:
    """Return one routed expert as an `FFN` that shares its weights."""
    ffn = FFN(experts.dim, experts.hidden_dim, **config.ffn_arguments(), device="meta")
    weights = {}
    for name in ffn.state_dict():
        stacked = getattr(experts, name.removesuffix(".weight").replace(".bias", "_bias"))
        whole = name.startswith("mix_") and experts.mixing == "layer"
        weights[name] = stacked if whole else stacked[number]
    ffn.load_state_dict(weights, assign=True)
    return ffn


def _expert_row(layer: str, logits: Tensor, indices: Tensor) -> Iterator[Row]:
    """Yield the row of a layer for router logits (B, T, E) and experts (B, T, k), unless logits are non-finite."""
    if not logits.isfinite().all():
        return
    count, k = logits.shape[-1], indices.shape[-1]
    reached = ((indices >= 0) & (indices < count)).sum().item()
    yield {
        "layer": layer,
        "load": expert_load(indices, count).tolist(),
        "entropy": router_entropy(logits).item(),
        "max_entropy": math.log(count),
        "balance_loss": load_balancing_loss(logits, k).item(),
        "assignments": indices.numel(),
        "dropped": indices.numel() - reached,
    }
