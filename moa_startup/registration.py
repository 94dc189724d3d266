"""Registration with lm-eval, timm and transformers after each of them has loaded.

lm-eval and transformers get names whose modules are imported on first use. timm's registry holds functions, so
`moa_vision.vit` is imported after timm, which adds milliseconds to timm's seconds.
"""

from __future__ import annotations

import importlib
import sys
from collections import UserDict
from collections.abc import ItemsView, ValuesView
from typing import Any

from moa_startup import warn

__all__ = ["LazyEntries", "lm_eval_model", "timm_models", "transformers_models"]

LM_EVAL_NAME, LM_EVAL_CLASS = "moa", "moa_eval.harness:MoALM"
TRANSFORMERS_MODEL_TYPE = "moa_llama"


def lm_eval_model() -> None:
    """Register a lazy placeholder for model `moa` with lm-eval.

    Releases after 0.4.13 have `load_plugins` and read this package's entry point `lm_eval.models`.
    """
    registry = importlib.import_module("lm_eval.api.registry")
    if not hasattr(registry, "load_plugins") and LM_EVAL_NAME not in registry.model_registry:
        registry.model_registry.register(LM_EVAL_NAME, target=LM_EVAL_CLASS)


def timm_models() -> None:
    """Register `vit_{size}_patch16_{variant}` with timm, unless `moa_vision.vit` is being imported already."""
    if "moa_vision.vit" not in sys.modules:  # waiting for the import of another thread could deadlock
        importlib.import_module("moa_vision.vit")


def transformers_models() -> None:
    """Register `moa_llama` with transformers' auto classes; `moa_lm` is imported on first use."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if TRANSFORMERS_MODEL_TYPE not in mapping:
        mapping._extra_content = LazyEntries(mapping._extra_content)
        mapping.register(TRANSFORMERS_MODEL_TYPE, _PENDING)


_PENDING: Any = object()


class LazyEntries(UserDict[str, Any]):
    """transformers' table of registered configurations (model type -> class), with one lazily imported entry.

    Importing `moa_lm` replaces the entry. Reading an entry that cannot be imported raises the import's error; iterating
    over all entries skips it with a warning.
    """

    def __getitem__(self, key: str) -> Any:
        if self.data[key] is _PENDING:
            self.data[key] = importlib.import_module("moa_lm").MoALlamaConfig
        return self.data[key]

    def items(self) -> ItemsView[str, Any]:
        """Return all model types and classes."""
        classes = {}
        for key in self:
            try:
                classes[key] = self[key]
            except Exception as error:
                warn(f"transformers: model type {key!r} cannot be loaded: {error!r}")
        return classes.items()

    def values(self) -> ValuesView[Any]:
        """Return all classes."""
        return dict(self.items()).values()
