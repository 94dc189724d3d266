"""Language-model training: a whole step against transformers' Llama, and the experts' layer against its experts.

`lm` is forward, loss, backward and fused AdamW of a named size. Llama has the same shapes, computes its loss as its
users have it, with the logits of all positions, and is what ratios refer to; ours takes the path of pre-training,
which needs no logits beside the loss.

`lm-experts` is the forward and backward of one layer with SwiGLU experts: ours, and Qwen2-MoE's block (router, routed
experts, shared expert) by each of transformers' `experts_implementation`. Ratios refer to a dense FFN as wide as the
experts that a token passes. `batched_mm` copies an expert's weights for each assignment, and is left out where that
takes more than 1 GiB. The default number of tokens is that of a micro-batch of configs/lm/moe_*.yaml; with fewer,
every expert's weights are read for fewer rows. float32 on a CPU; on a GPU the layers are bfloat16, and the step is
under its autocast.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moa_ffn import FFN

from .ffn import layer_case
from .measure import Case, device_seconds, measure
from .options import (
    MODES,
    add_common,
    add_layers,
    add_modes,
    add_sized,
    add_variants,
    in_mode,
    layers_remark,
    positive,
)
from .overhead import steps
from .table import memory, note, rate, report, speed_ratio, time_ratio, times
from .training import autocast, precision_name

TABLES = ("lm", "lm-experts")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
THEIRS = "transformers, "
AGAINST_BEST = "speed over transformers' best"
BATCHED_BYTES = 2**30
"""Weights that `batched_mm` may copy for a layer's inner projections."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    add_variants(parser, ("swiglu", "qdmoa"))
    add_modes(parser, cpu=MODES, cuda=MODES)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="tables to make (default: both)")
    add_sized(parser, "--size", "lm: a size of `python -m moa_lm sizes`", cpu="dense-tiny", cuda="dense-0.12b")
    add_sized(parser, "--batch", "lm: sequences a step", cpu=4, cuda=32)
    add_sized(parser, "--tokens", "lm: tokens a sequence", cpu=256, cuda=1024)
    add_sized(parser, "--vocab", "lm: tokens of the vocabulary", cpu=8192, cuda=50304)
    add_layers(parser)
    sizes = ("moe-tiny", "moe-0.25b")
    parser.add_argument(
        "--expert-sizes", nargs="+", default=sizes, help=f"lm-experts: named sizes (default: {' '.join(sizes)})"
    )
    parser.add_argument(
        "--expert-tokens", type=positive, default=32768, help="lm-experts: tokens of a pass (default: 32768)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    if "lm" in args.tables:
        benchmark_steps(args)
    if "lm-experts" in args.tables:
        benchmark_experts(args)


def benchmark_steps(args: argparse.Namespace) -> None:
    """Training steps of Llama and of ours with every variant, in every mode."""
    tokens = torch.randint(args.vocab, (args.batch, args.tokens), device=args.device)
    cases: list[Case] = []
    baselines: dict[str, Case] = {}
    for name, model, loss in language_models(args, tokens):
        for mode, step, held in steps(model, loss, args):
            labels = {"model": name, "mode": mode}
            case = Case(labels, step, tokens.numel(), baseline=baselines.get(mode), held_bytes=held)
            baselines.setdefault(mode, case)
            cases.append(case)
    measure(cases, args.device, args.rounds)
    remark = f"{args.size}, {args.batch} x {args.tokens} tokens, vocabulary of {args.vocab:,}"
    remark += f"{layers_remark(args)}, {precision_name(autocast(args.device))}, fused AdamW"
    columns = [*times("ms"), rate("tokens"), *speed_ratio(), *memory()]
    report("lm: full training step of a language model", cases, columns, args.device, args.out, remark)


def language_models(
    args: argparse.Namespace, tokens: Tensor
) -> Iterator[tuple[str, nn.Module, Callable[[Callable[..., Any]], Tensor]]]:
    """Name, model and loss on the tokens given the model's call: transformers' Llama, then ours by variant."""
    from transformers import LlamaForCausalLM

    from moa_lm import MoALlamaForCausalLM

    def loss(call: Callable[..., Any], **settings: Any) -> Tensor:
        return call(input_ids=tokens, labels=tokens, use_cache=False, **settings).loss

    theirs: nn.Module = LlamaForCausalLM(llama_config(args))
    yield "transformers.LlamaForCausalLM", nn.Module.to(theirs, args.device).train(), loss
    for variant in args.variants:
        ours: nn.Module = MoALlamaForCausalLM(our_config(args, variant))
        name = f"moa_lm, {variant}"
        yield name, nn.Module.to(ours, args.device).train(), partial(loss, skip_logits=True)


def our_config(args: argparse.Namespace, variant: str) -> Any:
    """The named size with the vocabulary, positions and layers asked for."""
    from moa_lm import named_config

    depth = {"num_hidden_layers": args.layers} if args.layers else {}
    positions = max(2048, args.tokens)
    return named_config(args.size, variant, vocab_size=args.vocab, max_position_embeddings=positions, **depth)


def llama_config(args: argparse.Namespace) -> Any:
    """transformers' configuration of the same shapes.

    Raises:
        ValueError: the size has experts, which Llama has not.
    """
    from transformers import LlamaConfig

    ours = our_config(args, "swiglu")
    if ours.num_experts:
        raise ValueError(f"--size {args.size} has experts; allowed are the dense sizes, which Llama has too")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
    shared += ("bos_token_id", "eos_token_id")
    return LlamaConfig(**{name: getattr(ours, name) for name in shared})


def benchmark_experts(args: argparse.Namespace) -> None:
    """The layer with experts at every size, by all implementations, in every mode."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    groups = [
        experts_group(args, size, mode, layers, config.hidden_size, dtype)
        for size in args.expert_sizes
        for config in [experts_config(size)]
        for layers in [expert_layers(config, args.expert_tokens, args.device, dtype)]
        for mode in args.modes
    ]
    cases = [case for group in groups for case in group]
    measure(cases, args.device, args.rounds, clock=device_seconds)
    for group in groups:
        note_best(group)
    columns = [*times("ms"), rate("tokens"), *time_ratio(), note(AGAINST_BEST), *memory()]
    remark = f"{args.expert_tokens} tokens, {str(dtype)[6:]}, SwiGLU; ratios to the dense FFN of the active width"
    report("lm-experts: the layer, forward and backward", cases, columns, args.device, args.out, remark)


def experts_group(
    args: argparse.Namespace, size: str, mode: str, layers: dict[str, nn.Module], width: int, dtype: torch.dtype
) -> list[Case]:
    """All layers of a size in a mode; the dense one comes first."""
    x = torch.randn(1, args.expert_tokens, width, device=args.device, dtype=dtype, requires_grad=True)
    cases: list[Case] = []
    for name, layer in layers.items():
        labels = {"size": size, "layer": name, "mode": mode}
        case = layer_case(layer, in_mode(layer, mode, args.compiler), x, "both", labels)
        case.items, case.baseline = args.expert_tokens, cases[0] if cases else None
        cases.append(case)
    return cases


def note_best(group: list[Case]) -> None:
    """Write into each case its speed over the fastest of transformers' in the group, the median over the rounds."""
    best = min((case for case in group if case.labels["layer"].startswith(THEIRS)), key=lambda case: case.median_s)
    for case in group:
        ratios = [other / own for own, other in zip(case.seconds, best.seconds, strict=True)]
        case.notes[AGAINST_BEST] = f"{statistics.median(ratios):.3f}"


def experts_config(size: str) -> Any:
    """A named size with experts, of SwiGLU.

    Raises:
        ValueError: the size is unknown or dense.
    """
    from moa_lm import named_config

    config = named_config(size, "swiglu")
    if not config.num_experts:
        raise ValueError(f"--expert-sizes {size} is dense; allowed are the sizes with experts")
    return config


def expert_layers(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """By name: a dense FFN of the active width, ours, and transformers' by every implementation that fits."""
    from moa_lm.moe import MoE

    width, hidden, top_k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    layers: dict[str, nn.Module] = {
        "dense FFN": FFN(width, (top_k + config.num_shared_experts) * hidden, "swiglu"),
        "moa_lm.MoE": MoE(config),
    }
    copied = tokens * top_k * 2 * hidden * width * dtype.itemsize
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or copied <= BATCHED_BYTES:
            layers[THEIRS + name] = qwen_block(config, name)
    return {name: layer.to(device, dtype) for name, layer in layers.items()}


def qwen_block(config: Any, implementation: str) -> nn.Module:
    """transformers' Qwen2-MoE block of the same sizes; its shared expert has a gate, which ours has not."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    theirs = Qwen2MoeConfig(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=config.num_shared_experts * config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
    )
    theirs._experts_implementation = implementation
    block: nn.Module = Qwen2MoeSparseMoeBlock(theirs)
    for weight in block.parameters():
        nn.init.normal_(weight, std=config.initializer_range)
    return block
