"""Undocumented parts of transformers that this project depends on, each with its reason.

Tested with transformers 5.17 and 5.24; `make test-latest` reports what a newer release breaks. One more is in
`moa_startup.registration`, which runs while transformers is being imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

# Decorators of every decoder's forward in transformers (5.17, 5.24). The first fills `use_cache` from the config; the
# second records hidden states, attentions and router logits for `output_*=True`. There is no documented alternative.
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = [
    "CACHE",
    "OutputRecorder",
    "ParentsInitializeChildren",
    "attention_implementation",
    "can_return_tuple",
    "capture_outputs",
    "merge_with_config_defaults",
    "takes_cache",
    "uses_attention_interface",
]

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the key-value cache in arguments and outputs: `cache` from transformers 5.24 on, else `past_key_values`."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward with a keyword `cache` so that it accepts `past_key_values` too.

    `generate` passes the name of its release; code for older releases passes `past_key_values`.
    """

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            kwargs["cache"] = cache if kwargs.get("cache") is None else kwargs["cache"]
        return forward(*args, **kwargs)

    return wrapper


class ParentsInitializeChildren:
    """Mixin of a `PreTrainedModel` that calls `_init_weights` for modules without own parameters too.

    transformers (5.17, 5.24) skips them in models that are not its own, so the rule for `nn.Linear` would override that
    of the mixing projection inside an `FFN`. Loaded parameters are not changed.
    """

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # pyright: ignore[reportAttributeAccessIssue]


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Return whether every model in `model` looks its attention up in `ALL_ATTENTION_FUNCTIONS`.

    The documented `set_attn_implementation` checks the same (5.17, 5.24) but only warns.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return all(module._can_set_attn_implementation() for module in models)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use the registered attention function `name` within the context.

    The field is the one that `set_attn_implementation` sets (5.17, 5.24). That method also loads kernels and checks all
    models, which is too slow for a context around every batch.
    """
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return every config below a model, parents first."""
    found: list[Any] = []
    todo: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop(0)
        if all(config is not other for other in found):
            found.append(config)
            todo += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
    return found
