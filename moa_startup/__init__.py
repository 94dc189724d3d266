"""Makes our models known to lm-eval, timm and transformers in every process of the environment, when those load.

`moa_startup.pth` lies beside the installed packages; Python reads it at each start, and it calls `install()`. From
then on the modules named in `HOOKS`, as soon as they have been executed, are followed by a function of
`moa_startup.registration`, so that these work with nothing of ours imported by hand:

    lm_eval --model moa ...                                (also `python -m lm_eval`, `accelerate launch -m lm_eval`)
    timm.create_model("vit_base_patch16_qdmoa")
    transformers.AutoModelForCausalLM.from_pretrained(DIR)        (model type `moa_llama`)

It loads nothing by itself and never raises: what fails is a RuntimeWarning. `MOA_STARTUP=0` in the environment turns
it off. Its cost at each start of Python is a fraction of a millisecond: `python -X importtime -c pass 2>&1 | grep
moa_startup` shows the import in microseconds, `python -m benchmarks startup` measures the whole line.
"""

import os
import sys

TYPE_CHECKING = False  # the checkers' name for it; importing typing would take longer than all of this file
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
"""Module -> the function of `moa_startup.registration` that runs after each execution of it."""


def install() -> None:
    """Watches for the modules of `HOOKS`; registers at once with those already imported. Again: changes nothing."""
    if os.environ.get("MOA_STARTUP") == "0" or _Watch in sys.meta_path:
        return
    sys.meta_path.insert(0, _Watch)
    for name in HOOKS:
        if name in sys.modules:
            _register(name)


class _Watch:
    """A finder that finds nothing itself: it asks the others and marks the loader they give for a watched module.

    It stays for good. Taking an entry out of `sys.meta_path` while another thread walks through the list makes that
    thread skip a finder; staying costs one dictionary look-up an import, and also serves modules imported anew.
    """

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in HOOKS:
            return None
        for finder in tuple(sys.meta_path):
            find_spec = None if finder is _Watch else getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec is not None:
                _mark(spec)
                return spec
        return None


def _mark(spec: "ModuleSpec") -> None:
    """Has `spec`'s loader come back here when it executes the module, once.

    The mark is an attribute of this one loader, which is made for this one spec, so that its type, its path, its
    source and all else that others read from it stay as they are. Loaders of other kinds (a zip file's serves many
    modules) are left alone.
    """
    from functools import partial
    from importlib.machinery import SourceFileLoader, SourcelessFileLoader

    if isinstance(spec.loader, SourceFileLoader | SourcelessFileLoader):
        vars(spec.loader)["exec_module"] = partial(_execute, spec.loader)


def _execute(loader: "SourceFileLoader | SourcelessFileLoader", module: "ModuleType") -> None:
    """Executes `module` as `loader` does without the mark, which is gone from now on, then registers."""
    vars(loader).pop("exec_module", None)
    loader.exec_module(module)
    _register(module.__name__)


def _register(name: str) -> None:
    """Runs the function that belongs to module `name`; a failure is a warning."""
    try:
        from moa_startup import registration

        getattr(registration, HOOKS[name])()
    except Exception as error:
        warn(f"mixture-of-activations is not registered with {name.partition('.')[0]}: {error!r}")


def warn(text: str) -> None:
    """A RuntimeWarning, or a line on stderr where warnings are errors: the import that is going on must not fail."""
    import warnings

    text += ". MOA_STARTUP=0 in the environment turns this registration off."
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(f"RuntimeWarning: {text}", file=sys.stderr)
