"""The parts of transformers that `moa_lm` uses beyond its documented interface, each with its reason.

Supported: transformers 5.17 to 5.24. `make test-latest` reports what a newer release breaks.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import create_causal_mask

# Decorators of every decoder's forward in transformers itself (seen in 5.17 and 5.24). The first fills `use_cache`
# from the config; the second records hidden states, attentions and router logits for `output_*=True`. A model without
# them lacks those arguments, and the documentation names no other way to support them.
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = [
    "CACHE",
    "OutputRecorder",
    "can_return_tuple",
    "capture_outputs",
    "merge_with_config_defaults",
    "takes_cache",
]

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the key-value cache in arguments and outputs: `cache` since transformers 5.24, `past_key_values` before."""

_OTHER_NAME = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE]


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward whose keyword `cache` is the key-value cache, so that callers may use either name.

    `generate` passes the name of its own release; code written for older releases passes `past_key_values`.
    """

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            kwargs["cache"] = cache if kwargs.get("cache") is None else kwargs["cache"]
        return forward(*args, **kwargs)

    return wrapper
