"""Registration of this project's models with lm-eval, timm and transformers when a process imports those.

Python reads `moa_startup.pth` in site-packages at every start and calls `install()`. After a module of `HOOKS` has been
executed, a function of `moa_startup.registration` runs. These work without importing this project:

    lm_eval --model moa ...                                (also `python -m lm_eval`, `accelerate launch -m lm_eval`)
    timm.create_model("vit_base_patch16_qdmoa")
    transformers.AutoModelForCausalLM.from_pretrained(DIR)        (model type `moa_llama`)

Nothing is loaded in advance, and failures are RuntimeWarnings. `MOA_STARTUP=0` in the environment disables the
registration. It costs a fraction of a millisecond per start of Python; `python -X importtime -c pass 2>&1 | grep
moa_startup` shows the import in microseconds.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # type checkers know this name; importing typing would take longer than this whole file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
    from types import ModuleType

__all__ = ["HOOKS", "install", "warn"]

HOOKS = {
    "lm_eval.models": "lm_eval_model",
    "timm": "timm_models",
    "transformers.models.auto.configuration_auto": "transformers_models",
}
"""Modules, and the functions of `moa_startup.registration` that run after each execution of them."""


def install() -> None:
    """Watch imports for the modules of `HOOKS` and register with those already imported; idempotent."""
    if os.environ.get("MOA_STARTUP") == "0" or _Watch in sys.meta_path:
        return
    sys.meta_path.insert(0, _Watch)
    for name in HOOKS:
        if name in sys.modules:
            _register(name)


class _Watch:
    """Finder that asks the other finders for a watched module and hooks the loader that they return.

    It is never removed: removing an entry of `sys.meta_path` while another thread iterates over it would make that
    thread skip a finder. It costs one dictionary look-up per import and also serves reloaded modules.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in HOOKS:
            return None
        for finder in tuple(sys.meta_path):
            find_spec = None if finder is _Watch else getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec is not None:
                _hook(spec)
                return spec
        return None


def _hook(spec: ModuleSpec) -> None:
    """Make the loader of `spec` call `_execute` once.

    An instance attribute of this one loader leaves its type, path and source unchanged. Loaders of other types, such as
    that of zip files, serve several modules and are not changed.
    """
    from functools import partial
    from importlib.machinery import SourceFileLoader, SourcelessFileLoader

    if isinstance(spec.loader, SourceFileLoader | SourcelessFileLoader):
        vars(spec.loader)["exec_module"] = partial(_execute, spec.loader)


def _execute(loader: SourceFileLoader | SourcelessFileLoader, module: ModuleType) -> None:
    """Remove the hook, execute `module` by `loader`, and register."""
    vars(loader).pop("exec_module", None)
    loader.exec_module(module)
    _register(module.__name__)


def _register(name: str) -> None:
    """Run the function of module `name`; a failure is a warning."""
    try:
        from moa_startup import registration

        getattr(registration, HOOKS[name])()
    except Exception as error:
        warn(f"mixture-of-activations is not registered with {name.partition('.')[0]}: {error!r}")


def warn(text: str) -> None:
    """Issue a RuntimeWarning, or print it where warnings are errors: the ongoing import must not fail."""
    import warnings

    text += ". MOA_STARTUP=0 in the environment disables this registration."
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(f"RuntimeWarning: {text}", file=sys.stderr)
