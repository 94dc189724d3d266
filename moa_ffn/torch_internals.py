"""Undocumented parts of torch that the layer depends on, each with its reason. Tested with torch 2.11 and 2.15.

`moa_train.torch_internals` is the same for runs.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["constant_in_graphs", "has_hooks", "import_inductor"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling `module` does more than its `forward`.

    torch has no public question for it; hooks live in these four dictionaries.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function whose result `torch.compile` takes as a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but importing it imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def import_inductor() -> None:
    """Import what Inductor needs to compile for the CPU, without its warning about CUDA.

    `torch.utils.cpp_extension` warns where there is a CUDA toolkit and no GPU, which does not matter here.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("torch.utils.cpp_extension")
    finally:
        logger.setLevel(level)
