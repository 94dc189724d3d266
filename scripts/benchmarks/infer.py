"""What serving costs: ViT features, language-model prefill and decoding, at small and large batch.

Each variant against the fixed FFN of its type: swiglu for Type-II, gelu (ViT) or relu2 (language model) for Type-I.
A ViT gives its pooled features; prefill fills the key-value cache and computes the last token's logits; decoding
appends greedily to a static cache, one token of every sequence a step. bfloat16 on a GPU, float32 on a CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Case, measure
from .options import (
    add_common,
    add_layers,
    add_modes,
    add_sized,
    add_variants,
    in_mode,
    layers_remark,
    positive,
    with_baselines,
)
from .overhead import VARIANTS
from .table import Column, memory, rate, report, speed_ratio, time_ratio, times
from .training import held_bytes

Call = Callable[..., Any]
TITLES = {
    "vit": "ViT features",
    "prefill": "language-model prefill",
    "decode": "language-model decoding, one token a sequence",
}
TASKS = tuple(TITLES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common(parser)
    add_variants(parser, VARIANTS)
    add_modes(parser, cpu=("uncompiled",), cuda=("uncompiled", "compiled"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tables to make (default: all)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 32], help="batch sizes (default: 1 32)")
    parser.add_argument("--vit-size", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a side (default: %(default)s)")
    add_sized(parser, "--size", "a size of `python -m moa_lm sizes`", cpu="dense-0.12b", cuda="dense-0.5b")
    add_sized(parser, "--prompt", "tokens of a prompt", cpu=128, cuda=1024)
    add_sized(parser, "--new-tokens", "tokens that a run appends to it", cpu=16, cuda=64)
    add_layers(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    model = f"{args.size}, prompts of {args.prompt} tokens"
    shapes = {"vit": f"ViT-{args.vit_size}/16, {args.image_size} pixels", "prefill": model}
    shapes["decode"] = f"{model}, {args.new_tokens} steps a run"
    for task in args.tasks:
        remark = f"{shapes[task]}, {str(dtype)[6:]}{layers_remark(args)}"
        cases = measured(args, task, dtype)
        report(f"infer-{task}: {TITLES[task]}", cases, columns(task), args.device, args.out, remark)


def columns(task: str) -> list[Column]:
    """Those of a table."""
    if task == "decode":
        return [*times("ms", per="token"), rate("tokens"), *time_ratio(), *memory()]
    return [*times("ms"), rate("images" if task == "vit" else "tokens"), *speed_ratio(), *memory()]


def measured(args: argparse.Namespace, task: str, dtype: torch.dtype) -> list[Case]:
    """The cases of a table; the models of one type are in memory together."""
    type_one, other = ("gelu", "relu2") if task == "vit" else ("relu2", "gelu")
    groups = with_baselines([name for name in args.variants if name != other], type_one)
    return [case for variants in groups.values() for case in measured_group(args, task, variants, dtype)]


def measured_group(args: argparse.Namespace, task: str, variants: list[str], dtype: torch.dtype) -> list[Case]:
    """The variants of one type, the baseline first, at every batch size in every mode."""
    models = {variant: build(args, task, variant, dtype) for variant in variants}
    cases = []
    for batch, mode in product(args.batches, args.modes):
        first: Case | None = None
        for variant, model in models.items():
            labels = {"variant": variant, "batch": str(batch), "mode": mode}
            case = CASES[task](model, in_mode(model, mode, args.compiler), batch, args, labels)
            first = case.baseline = first or case
            cases.append(case)
    with torch.no_grad():
        measure(cases, args.device, args.rounds)
    for case in cases:
        case.release()
    return cases


def build(args: argparse.Namespace, task: str, variant: str, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode, with random weights."""
    if task == "vit":
        import timm

        from moa_vision.vit import model_name

        depth = {"depth": args.layers} if args.layers else {}
        name = model_name(args.vit_size, variant)
        model = timm.create_model(name, img_size=args.image_size, num_classes=0, **depth)
    else:
        from moa_lm import MoALlamaForCausalLM, named_config

        positions = max(2048, args.prompt + args.new_tokens)
        depth = {"num_hidden_layers": args.layers} if args.layers else {}
        model = MoALlamaForCausalLM(named_config(args.size, variant, max_position_embeddings=positions, **depth))
    for weight in model.parameters():  # buffers keep float32, as in from_pretrained: rotary frequencies need it
        weight.data = weight.data.to(dtype)
    return nn.Module.to(model, args.device).eval()


def vit_case(model: nn.Module, call: Call, batch: int, args: argparse.Namespace, labels: dict[str, str]) -> Case:
    """Pooled features of a batch of images."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=args.device, dtype=dtype)
    return Case(labels, partial(call, images), items=batch, held_bytes=partial(held_bytes, model))


def prefill_case(model: nn.Module, call: Call, batch: int, args: argparse.Namespace, labels: dict[str, str]) -> Case:
    """Prompts into a fresh cache."""
    prompt = random_prompt(model, batch, args)
    run = partial(call, input_ids=prompt, use_cache=True, logits_to_keep=1)
    return Case(labels, run, items=prompt.numel(), held_bytes=partial(held_bytes, model))


def decode_case(model: nn.Module, call: Call, batch: int, args: argparse.Namespace, labels: dict[str, str]) -> Case:
    """`new_tokens` steps after prompts; the prompts are not timed, and the model is compiled for the steps alone."""
    decoding = Decoding(model, call, random_prompt(model, batch, args), args.new_tokens)
    notes = {"token": str(args.new_tokens)}
    items = batch * args.new_tokens
    return Case(labels, decoding.run, items, decoding.prepare, held_bytes=decoding.held_bytes, notes=notes)


CASES = {"vit": vit_case, "prefill": prefill_case, "decode": decode_case}


def random_prompt(model: Any, batch: int, args: argparse.Namespace) -> Tensor:
    """Tokens (B, T), the same for all models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, args.prompt), generator=generator).to(args.device)


class Decoding:
    """Greedy decoding with a static cache, whose shapes stay the same from step to step.

    Args:
        model: fills the cache with the prompt.
        call: the same model, maybe compiled, for the steps.
        prompt: (B, T).
        steps: tokens to append.
    """

    def __init__(self, model: Any, call: Call, prompt: Tensor, steps: int) -> None:
        from transformers import StaticCache

        from moa_lm.transformers_internals import CACHE

        self.model, self.call, self.prompt, self.steps = model, call, prompt, steps
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
        self.arguments: dict[str, Any] = {CACHE: self.cache, "use_cache": True, "logits_to_keep": 1}

    def prepare(self) -> Tensor:
        """The cache filled with the prompt; its continuation's first token (B, 1)."""
        self.cache.reset()
        return self._next(self.model, self.prompt)

    def run(self, token: Tensor) -> Tensor:
        """The first token and those of all steps, (B, 1 + steps)."""
        tokens = [token]
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens.append(self._next(self.call, tokens[-1]))
        return torch.cat(tokens, dim=1)

    def held_bytes(self) -> int:
        """Weights and cache."""
        layers: list[Any] = self.cache.layers
        return held_bytes(self.model) + sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))

    def _next(self, call: Call, tokens: Tensor) -> Tensor:
        output = call(input_ids=tokens, **self.arguments)
        return output.logits[:, -1:].argmax(-1)
