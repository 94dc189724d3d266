"""What a language model does with held-out tokens: which activations they mix, and which experts they go to.

FOLDER/mixing/step_XXXXXXXX.json     each recorded step: the coefficients' spread over the tokens, by layer
FOLDER/experts/step_XXXXXXXX.json    each recorded step: the routers' choices, by layer

A layer is called "model.3"; with experts that is the routed ones, and the shared ones are "model.3.shared".
"""

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
"""Tokens that are looked at, at most: plenty for percentiles, and little beside a validation."""

Row = dict[str, Any]


class Watched(NamedTuple):
    """Rows of the two files, one a layer; empty where nothing is mixed, or where there are no experts."""

    mixing: list[Row]
    experts: list[Row]


@torch.no_grad()
def watch(model: MoALlamaForCausalLM, input_ids: Tensor, position_ids: Tensor | None = None) -> Watched:
    """Run the decoder on tokens and note what its mixing layers and routers do.

    Coefficients and shares of routed experts are taken over their assignments, so that a token counts k times, once
    in each expert that it goes to and equally, whatever the weights there.

    Args:
        model: not wrapped; it is run in evaluation mode and left in the mode it was in.
        input_ids: (B, T) tokens on the model's device; as many whole sequences are used as `MAX_TOKENS` has room for,
            but at least one.
        position_ids: (B, T), of `document_positions` where documents are masked.

    Returns:
        Mixing rows: see `moa_ffn.mixing_stats.mixing_row`.
        Expert rows: layer, load (each expert's share of the assignments), entropy (mean of the router's softmax, in
        nats) and max_entropy, balance_loss (1 is perfect balance), assignments (k for each token) and dropped (those
        that reached no expert).
        A layer whose weights are so large that nothing is a number any more has no row.
    """
    rows = max(1, MAX_TOKENS // input_ids.shape[1])
    training = model.training
    model.eval()
    try:
        # Not through `model(...)`: where the model is compiled, that would pass the hooks by.
        with _noted(model, sequence_length=input_ids.shape[1]) as found:
            positions = None if position_ids is None else position_ids[:rows]
            model.model(input_ids[:rows], position_ids=positions, use_cache=False)
    finally:
        model.train(training)
    return found


def save_mixing(watched: Watched, folder: Path, *, step: int) -> None:
    """Write the mixing rows into `folder` (made if missing), the file whole or not at all; no rows, no file.

    Args:
        watched: what `watch` found.
        folder: where to, the run folder's `mixing`.
        step: training step of the weights.
    """
    _save(watched.mixing, folder, step)


def save_experts(watched: Watched, folder: Path, *, step: int) -> None:
    """Write the expert rows into `folder`, the run folder's `experts`; otherwise as `save_mixing`."""
    _save(watched.experts, folder, step)


def _save(rows: list[Row], folder: Path, step: int) -> None:
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"step_{step:08d}.json", {"step": step, "layers": rows})


@contextmanager
def _noted(model: MoALlamaForCausalLM, *, sequence_length: int) -> Iterator[Watched]:
    """While entered, every call of a mixing FFN, of routed experts and of a router adds its row, in order."""
    found = Watched([], [])

    def note_mixing(layer: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FFN | Experts)
        used = _used(module, inputs[0].flatten(0, -2)) if isinstance(module, FFN) else _routed(module, model, *inputs)
        row = mixing_row(layer, module.spec.terms, module.spec.token_adaptive, *used)
        found.mixing.extend([] if row is None else [row])

    def note_router(layer: str, _: nn.Module, __: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        logits, _weights, indices = (values.unflatten(0, (-1, sequence_length)) for values in outputs)
        found.experts.extend(_expert_row(layer, logits, indices))

    handles = []
    for index, block in enumerate(model.model.layers):
        layer, feedforward = f"model.{index}", block.get_submodule("mlp")
        mixing: dict[str, nn.Module | None] = {layer: feedforward}
        if isinstance(feedforward, MoE):
            handles.append(feedforward.router.register_forward_hook(partial(note_router, layer)))
            mixing = {layer: feedforward.experts, f"{layer}.shared": feedforward.shared_experts}
        for name, module in mixing.items():
            if isinstance(module, FFN | Experts) and module.spec.num_coefficients:
                handles.append(module.register_forward_pre_hook(partial(note_mixing, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _used(ffn: FFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and shares (N, K), float32, of the tokens x (N, D)."""
    return ffn.mixing(x).flatten(-2).float(), ffn.shares(x).flatten(-2).float()


def _routed(
    experts: Experts, model: MoALlamaForCausalLM, hidden: Tensor, _: Tensor, indices: Tensor
) -> tuple[Tensor, ...]:
    """Coefficients and shares (S, K) of routed experts' assignments, for their inputs (N, D), (N, k), (N, k)."""
    ffns = (_expert(experts, e, model.config) for e in range(experts.num_experts))
    used = [_used(ffn, hidden[(indices == e).any(-1)]) for e, ffn in enumerate(ffns)]
    return tuple(map(torch.cat, zip(*used, strict=True)))


def _expert(experts: Experts, number: int, config: MoALlamaConfig) -> FFN:
    """One routed expert as an `FFN`, which shares the weights."""
    ffn = FFN(experts.dim, experts.hidden_dim, **config.ffn_arguments(), device="meta")
    weights = {}
    for name in ffn.state_dict():
        stacked = getattr(experts, name.removesuffix(".weight").replace(".bias", "_bias"))
        whole = name.startswith("mix_") and experts.mixing == "layer"
        weights[name] = stacked if whole else stacked[number]
    ffn.load_state_dict(weights, assign=True)
    return ffn


def _expert_row(layer: str, logits: Tensor, indices: Tensor) -> Iterator[Row]:
    """The row of one layer from router logits (B, T, E) and chosen experts (B, T, k); none if they are not finite."""
    if not logits.isfinite().all():
        return
    count, k = logits.shape[-1], indices.shape[-1]
    reached = ((indices >= 0) & (indices < count)).sum().item()
    yield {
        "layer": layer,
        "load": expert_load(indices, count).tolist(),
        "entropy": router_entropy(logits).item(),
        "max_entropy": math.log(count),
        "balance_loss": load_balancing_loss(logits, k, indices=indices).item(),
        "assignments": indices.numel(),
        "dropped": indices.numel() - reached,
    }
