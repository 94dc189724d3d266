"""Language-model training: a whole step against transformers' Llama, and the layer with experts against its experts.

`lm` is forward, loss, backward and fused AdamW of a named size. Ratios refer to Llama of the same shapes, whose loss
uses the logits of all positions. Ours takes the path of pre-training, which does not return logits.

`lm-experts` is forward and backward of one layer with SwiGLU experts: ours, and Qwen2-MoE's block (router, routed
experts, shared expert) with each of transformers' `experts_implementation`. Ratios refer to a dense FFN of the active
width. The default number of tokens is that of a micro-batch of configs/lm/moe_*.yaml. The layers are float32 on a CPU
and bfloat16 on a GPU; the step uses autocast there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ffn import layer_case
from benchmarks.models import autocast, language_model, lm_loss, precision_name
from benchmarks.options import MODES, add_layers, add_modes, add_number, add_variants, in_mode, on_gpu
from benchmarks.overhead import Loss, step_cases
from benchmarks.tables import memory, note, rate, report, speed_ratio, time_ratio, times
from benchmarks.timing import Case, device_seconds, measure
from moa_ffn import FFN
from moa_train.errors import require

TABLES = ("lm", "lm-experts")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
THEIRS = "transformers, "
AGAINST_BEST = "speed over transformers' best"

BATCHED_BYTES = 2**30
"""Most bytes that `batched_mm`, which copies an expert's weights for every assignment, may use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, ("swiglu", "qdmoa"))
    add_modes(parser, MODES)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: both")
    parser.add_argument("--size", default=on_gpu("dense-tiny", "dense-0.12b"), help="lm: default %(default)s")
    add_number(parser, "--batch", on_gpu(4, 32), "lm: sequences a step")
    add_number(parser, "--tokens", on_gpu(256, 1024), "lm: tokens a sequence")
    add_number(parser, "--vocab", on_gpu(8192, 50304), "lm: tokens of the vocabulary")
    add_layers(parser)
    sizes = ["moe-tiny", "moe-0.25b"]
    text = f"lm-experts: sizes with experts (default: {' '.join(sizes)})"
    parser.add_argument("--expert-sizes", nargs="+", default=sizes, help=text)
    add_number(parser, "--expert-tokens", 32768, "lm-experts: tokens of a pass")


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    if "lm" in args.tables:
        benchmark_steps(args)
    if "lm-experts" in args.tables:
        benchmark_experts(args)


def benchmark_steps(args: argparse.Namespace) -> None:
    """Measure training steps of Llama and of ours with every variant, in every mode."""
    tokens = torch.randint(args.vocab, (args.batch, args.tokens), device=args.device)
    cases: list[Case] = []
    for name, model, loss in models(args, tokens):
        added = step_cases({"model": name}, model.to(args.device).train(), loss, tokens.numel(), args)
        for case, baseline in zip(added, cases[: len(added)] or added, strict=True):
            case.baseline = baseline
        cases += added
    measure(cases, args.device, args.rounds)
    remark = f"{args.size}, {args.batch} x {args.tokens} tokens, vocabulary of {args.vocab:,}"
    remark += f", {args.layers} layers only" if args.layers else ""
    remark += f", {precision_name(autocast(args.device))}, fused AdamW"
    columns = [*times("ms"), rate("tokens"), *speed_ratio(), *memory()]
    report("lm: training step of a language model", cases, columns, args.device, args.out, remark)


def models(args: argparse.Namespace, tokens: Tensor) -> Iterator[tuple[str, nn.Module, Loss]]:
    """Yield name, model and loss of transformers' Llama, then of ours by variant."""
    yield "transformers.LlamaForCausalLM", llama(our_model(args, "swiglu")), partial(lm_loss, tokens=tokens)
    for variant in args.variants:
        yield f"moa_lm, {variant}", our_model(args, variant), partial(lm_loss, tokens=tokens, skip_logits=True)


def our_model(args: argparse.Namespace, variant: str) -> Any:
    """Return the named size with the requested vocabulary, positions and layers."""
    return language_model(args.size, variant, args.tokens, args.layers, vocab_size=args.vocab)


def llama(model: Any) -> nn.Module:
    """Return transformers' Llama with the shapes of our model.

    Raises:
        ConfigError: Our model has experts.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = model.config
    require("--size", ours.num_experts, not ours.num_experts, "a dense size, because Llama has no experts")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
    shared += ("bos_token_id", "eos_token_id")
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(ours, name) for name in shared}))


def benchmark_experts(args: argparse.Namespace) -> None:
    """Measure the layer with experts at every size, by all implementations, in every mode."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    groups = []
    for size in args.expert_sizes:
        config = experts_config(size)
        layers = expert_layers(config, args.expert_tokens, args.device, dtype)
        shape = (1, args.expert_tokens, config.hidden_size)
        x = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)
        groups += [experts_group(args, size, mode, layers, x) for mode in args.modes]
    cases = [case for group in groups for case in group]
    measure(cases, args.device, args.rounds, clock=device_seconds)
    for group in groups:
        add_speed_over_best(group)
    columns = [*times("ms"), rate("tokens"), *time_ratio(), note(AGAINST_BEST), *memory()]
    remark = f"{args.expert_tokens} tokens, {str(dtype)[6:]}, SwiGLU; ratios to the dense FFN of the active width"
    report("lm-experts: the layer, forward and backward", cases, columns, args.device, args.out, remark)


def experts_group(
    args: argparse.Namespace, size: str, mode: str, layers: dict[str, nn.Module], x: Tensor
) -> list[Case]:
    """Return all layers of a size in a mode; the dense one is the baseline."""
    cases: list[Case] = []
    for name, layer in layers.items():
        labels = {"size": size, "layer": name, "mode": mode}
        case = layer_case(layer, in_mode(layer, mode, args.compiler), x, "both", labels)
        case.items, case.baseline = args.expert_tokens, cases[0] if cases else None
        cases.append(case)
    return cases


def add_speed_over_best(group: list[Case]) -> None:
    """Note each case's median speed over the fastest of transformers' implementations."""
    best = min((case for case in group if case.labels["layer"].startswith(THEIRS)), key=lambda case: case.median_s)
    for case in group:
        ratios = [other / own for own, other in zip(case.seconds, best.seconds, strict=True)]
        case.notes[AGAINST_BEST] = f"{statistics.median(ratios):.3f}"


def experts_config(size: str) -> Any:
    """Return the config of a named size with SwiGLU experts.

    Raises:
        ConfigError: The size is dense.
    """
    from moa_lm import named_config

    config = named_config(size, "swiglu")
    require("--expert-sizes", size, config.num_experts > 0, "a size with experts")
    return config


def expert_layers(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return a dense FFN of the active width, ours, and transformers' by every implementation that fits."""
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
    """Return transformers' Qwen2-MoE block of the same sizes; its shared expert has an additional gate."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    shared = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")
    theirs = Qwen2MoeConfig(
        shared_expert_intermediate_size=config.num_shared_experts * config.moe_intermediate_size,
        **{name: getattr(config, name) for name in shared},
    )
    theirs._experts_implementation = implementation
    block: nn.Module = Qwen2MoeSparseMoeBlock(theirs)
    for weight in block.parameters():
        nn.init.normal_(weight, std=config.initializer_range)
    return block
