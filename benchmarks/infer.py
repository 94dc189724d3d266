"""The cost of inference: ViT features, language-model prefill and decoding, at small and large batch.

Ratios refer to the fixed FFN of each type: swiglu for Type-II, gelu (ViT) or relu2 (language model) for Type-I. Prefill
fills the key-value cache and computes the last token's logits. Decoding appends greedily to a static cache, one token
per sequence and step. bfloat16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import held_bytes, language_model
from benchmarks.options import (
    add_layers,
    add_modes,
    add_number,
    add_variants,
    in_mode,
    on_gpu,
    positive,
    with_baselines,
)
from benchmarks.overhead import VARIANTS, other_baseline
from benchmarks.tables import memory, rate, report, speed_ratio, time_ratio, times
from benchmarks.timing import Case, measure

TITLES = {"vit": "ViT features", "prefill": "language-model prefill", "decode": "language-model decoding"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_variants(parser, VARIANTS)
    add_modes(parser, on_gpu(("uncompiled",), ("uncompiled", "compiled")))
    parser.add_argument("--tasks", nargs="+", choices=TITLES, default=list(TITLES), help="default: all")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 32], help="batch sizes (default: 1 32)")
    parser.add_argument("--vit-size", default="base", help="tiny, small, base or large (default: %(default)s)")
    add_number(parser, "--image-size", 224, "pixels of a side")
    parser.add_argument("--size", default=on_gpu("dense-0.12b", "dense-0.5b"), help="default: %(default)s")
    add_number(parser, "--prompt", on_gpu(128, 1024), "tokens of a prompt")
    add_number(parser, "--new-tokens", on_gpu(16, 64), "tokens that a run appends")
    add_layers(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    model = f"{args.size}, prompts of {args.prompt} tokens"
    shapes = {"vit": f"ViT-{args.vit_size}/16, {args.image_size} pixels", "prefill": model}
    shapes["decode"] = f"{model}, {args.new_tokens} new tokens a run"
    for task in args.tasks:
        kind, type_one = ("mae", "gelu") if task == "vit" else ("lm", "relu2")
        kept = [name for name in args.variants if not other_baseline(name, kind)]
        groups = with_baselines(kept, type_one).values()
        cases = [case for variants in groups for case in measured_group(args, task, variants, dtype)]
        ratio = time_ratio() if task == "decode" else speed_ratio()
        columns = [*times("ms"), rate("images" if task == "vit" else "tokens"), *ratio, *memory()]
        remark = f"{shapes[task]}, {str(dtype)[6:]}" + (f", {args.layers} layers only" if args.layers else "")
        report(f"infer-{task}: {TITLES[task]}", cases, columns, args.device, args.out, remark)


def measured_group(args: argparse.Namespace, task: str, variants: list[str], dtype: torch.dtype) -> list[Case]:
    """Measure the variants of one type, the baseline first, at every batch size in every mode."""
    make_case = {"vit": vit_case, "prefill": prefill_case, "decode": decode_case}[task]
    models = {variant: build(args, task, variant, dtype) for variant in variants}
    cases = []
    for batch, mode in product(args.batches, args.modes):
        baseline: Case | None = None
        for variant, model in models.items():
            case = make_case(model, in_mode(model, mode, args.compiler), batch, args)
            case.labels = {"variant": variant, "batch": str(batch), "mode": mode}
            baseline = case.baseline = baseline or case
            cases.append(case)
    with torch.no_grad():
        measure(cases, args.device, args.rounds)
    for case in cases:
        case.release()
    return cases


def build(args: argparse.Namespace, task: str, variant: str, dtype: torch.dtype) -> nn.Module:
    """Return the model in evaluation mode, with random weights."""
    if task == "vit":
        import timm

        from moa_vision.vit import model_name

        depth = {"depth": args.layers} if args.layers else {}
        name = model_name(args.vit_size, variant)
        with args.device:
            model = timm.create_model(name, img_size=args.image_size, num_classes=0, **depth)
    else:
        with args.device:
            model = language_model(args.size, variant, args.prompt + args.new_tokens, args.layers)
    for weight in model.parameters():  # as in from_pretrained, buffers such as rotary frequencies stay float32
        weight.data = weight.data.to(dtype)
    return model.eval()


def vit_case(model: nn.Module, call: Callable[..., Any], batch: int, args: argparse.Namespace) -> Case:
    """Return pooled features of a batch of images."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=args.device, dtype=dtype)
    return Case({}, partial(call, images), items=batch, held_bytes=partial(held_bytes, model))


def prefill_case(model: nn.Module, call: Callable[..., Any], batch: int, args: argparse.Namespace) -> Case:
    """Return prompts into a fresh cache."""
    prompt = random_prompt(model, batch, args)
    prefill = partial(call, input_ids=prompt, use_cache=True, logits_to_keep=1)
    return Case({}, prefill, items=prompt.numel(), held_bytes=partial(held_bytes, model))


def decode_case(model: nn.Module, call: Callable[..., Any], batch: int, args: argparse.Namespace) -> Case:
    """Return the steps after prompts; the prompts are not timed and not compiled."""
    decoding = Decoding(model, call, random_prompt(model, batch, args), args.new_tokens)
    return Case({}, decoding.run, batch * args.new_tokens, decoding.prepare, held_bytes=decoding.held_bytes)


def random_prompt(model: Any, batch: int, args: argparse.Namespace) -> Tensor:
    """Return tokens (B, T), the same for all models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, args.prompt), generator=generator).to(args.device)


class Decoding:
    """Greedy decoding with a static cache, whose shapes are the same in every step.

    Args:
        model: Fills the cache with the prompt.
        call: The model of the steps, compiled or not.
        prompt: (B, T).
        steps: Tokens to append.
    """

    def __init__(self, model: Any, call: Callable[..., Any], prompt: Tensor, steps: int) -> None:
        from transformers import StaticCache

        from moa_lm.transformers_internals import CACHE

        self.model, self.call, self.prompt, self.steps = model, call, prompt, steps
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
        self.arguments: dict[str, Any] = {CACHE: self.cache, "use_cache": True, "logits_to_keep": 1}

    def prepare(self) -> Tensor:
        """Fill the cache with the prompt; return the first new token (B, 1)."""
        self.cache.reset()
        return self._next(self.model, self.prompt)

    def run(self, token: Tensor) -> Tensor:
        """Return the first token and those of all steps, (B, 1 + steps)."""
        tokens = [token]
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens.append(self._next(self.call, tokens[-1]))
        return torch.cat(tokens, dim=1)

    def held_bytes(self) -> int:
        """Return the bytes of weights and cache."""
        layers: list[Any] = self.cache.layers
        return held_bytes(self.model) + sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))

    def _next(self, call: Callable[..., Any], tokens: Tensor) -> Tensor:
        output = call(input_ids=tokens, **self.arguments)
        return output.logits[:, -1:].argmax(-1)
