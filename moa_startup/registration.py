"""What `moa_startup` does after lm-eval, timm and transformers have loaded: one function each.

Only what is asked for is loaded: lm-eval and transformers get names whose modules are imported with their first use.
timm's registry holds functions, so timm gets `moa_vision.vit` itself: milliseconds after timm's own seconds.
"""

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
    """Puts a lazy placeholder for model `moa` into lm-eval's registry, after lm-eval's own.

    Releases after 0.4.13 have `load_plugins` and read the entry point `lm_eval.models` of our package by themselves.
    """
    registry = importlib.import_module("lm_eval.api.registry")
    if not hasattr(registry, "load_plugins") and LM_EVAL_NAME not in registry.model_registry:
        registry.model_registry.register(LM_EVAL_NAME, target=LM_EVAL_CLASS)


def timm_models() -> None:
    """Registers `vit_{size}_patch16_{variant}` with timm; nothing to do while somebody imports our ViTs already."""
    if "moa_vision.vit" not in sys.modules:  # waiting for another thread's import could deadlock
        importlib.import_module("moa_vision.vit")


def transformers_models() -> None:
    """Tells transformers' auto classes of `moa_llama`, whose `moa_lm` is imported when the class is asked for."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if TRANSFORMERS_MODEL_TYPE not in mapping:
        mapping._extra_content = LazyEntries(mapping._extra_content)
        mapping.register(TRANSFORMERS_MODEL_TYPE, _PENDING)


_PENDING: Any = object()


class LazyEntries(UserDict[str, Any]):
    """transformers' table of registered configurations (model type -> class), with one entry that is imported late.

    `moa_lm`, while it is imported, registers its configuration and its models with the auto classes, and so replaces
    the entry. Asking for that entry gives the import's error; to whoever goes through all of them, one that cannot
    be imported is not there, with a warning.
    """

    def __getitem__(self, key: str) -> Any:
        if self.data[key] is _PENDING:
            self.data[key] = importlib.import_module("moa_lm").MoALlamaConfig
        return self.data[key]

    def items(self) -> ItemsView[str, Any]:
        """All model types and classes."""
        classes = {}
        for key in self:
            try:
                classes[key] = self[key]
            except Exception as error:
                warn(f"transformers: model type {key!r} cannot be loaded: {error!r}")
        return classes.items()

    def values(self) -> ValuesView[Any]:
        """All classes."""
        return dict(self.items()).values()
