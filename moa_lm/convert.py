"""A Llama-family checkpoint taken over: the same weights, any Type-II FFN of the family."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from moa_ffn import FFNSpec
from moa_lm.configuration import SILU, MoALlamaConfig

Model = TypeVar("Model", bound=PreTrainedModel)

ACCEPTED = "llama; mistral without a sliding window; moa_llama with ffn_variant swiglu"
"""Architectures whose weights map one to one."""

LOADING = (
    *("dtype", "device_map", "max_memory", "offload_folder", "attn_implementation"),
    *("revision", "token", "cache_dir", "local_files_only"),
)
"""Keyword arguments of `from_llama` that are `from_pretrained`'s; all others are fields of the configuration."""

_SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("num_experts", "num_shared_experts", "moe_intermediate_size"),
)
_FAULTS = (
    *(StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    RecursionError,  # of a deeply nested file
)
"""What transformers raises for a damaged folder. Its OSErrors are not here: they name the file themselves."""

_NOT_CARRIED = ("transformers_version", "architectures", "dtype")
_MIXING = re.compile(r"\.mix_(proj|coef)\b|\.mix_proj_bias\b")


def from_llama(
    cls: type[Model],
    source: str | PathLike[str] | PreTrainedModel,
    variant: str = "swiglu",
    **settings: Any,
) -> Model:
    """The work of `MoALlamaForCausalLM.from_llama`; see there."""
    loading = {name: settings.pop(name) for name in LOADING if name in settings}
    if isinstance(source, PreTrainedModel):
        config = converted_config(source.config, variant, **settings)
        loading = {"dtype": source.dtype, "device_map": source.device} | loading
        loading["state_dict"] = {name: weight.detach().clone() for name, weight in source.state_dict().items()}
        source_name = None
    else:
        source_name = existing_source(source, "a Llama checkpoint")
        remote = {name: loading[name] for name in LOADING[-4:] if name in loading}
        with naming(f"{source_name}/config.json"):
            original = AutoConfig.from_pretrained(source_name, trust_remote_code=False, **remote)
            _check_source(original)
        config = converted_config(original, variant, **settings)
        loading = {"dtype": "auto", "use_safetensors": True} | loading
        config.dtype = original.dtype
    loading |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_complete` says it in words
    with naming(source_name):
        if source_name is not None:
            require_shapes(cls, Path(source_name), config, new=_MIXING)
        with _expected_report():
            loaded = cls.from_pretrained(source_name, config=config, **loading)
        model, report = cast("tuple[Model, dict[str, Any]]", loaded)
        _check_complete(report)
    if isinstance(source, PreTrainedModel) and source.generation_config is not None:
        model.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return model


def converted_config(source: PreTrainedConfig, variant: str, **overrides: Any) -> MoALlamaConfig:
    """The configuration of `source` with `variant` as its FFN.

    Args:
        source: configuration of one of the architectures in `ACCEPTED`.
        variant: a Type-II member of `moa_ffn.VARIANTS`.
        overrides: fields to set, such as ffn_mixing_gate; those that change the shape of a weight are not allowed.

    Raises:
        ValueError: the source cannot be taken over, or a setting is not allowed.
    """
    _check_source(source)
    if not FFNSpec(variant).type_two:
        raise ValueError(
            f"variant={variant!r} is Type-I: it has no up branch, so a Llama's up_proj would be lost; "
            "allowed: Type-II variants, such as swiglu and qdmoa"
        )
    names = {field.name for field in fields(MoALlamaConfig)}
    for name in overrides:
        if name in _SHAPES:
            raise ValueError(f"{name}={overrides[name]!r}: the checkpoint decides it, leave it out")
        if name not in names:
            allowed = ", ".join(sorted((names | set(LOADING)) - set(_SHAPES)))
            raise ValueError(f"unknown setting {name!r}; allowed: {allowed}")
    carried = {name: value for name, value in source.to_dict().items() if name in names and name not in _NOT_CARRIED}
    return MoALlamaConfig(**{**carried, **overrides, "ffn_variant": variant})


def _check_source(source: PreTrainedConfig) -> None:
    kind = source.model_type
    window = getattr(source, "sliding_window", None)
    reasons = {
        f"model_type={kind!r}": kind not in ("llama", "mistral", "moa_llama"),
        f"sliding_window={window}": kind == "mistral" and window is not None,
        f"ffn_variant={getattr(source, 'ffn_variant', None)!r}": getattr(source, "ffn_variant", "swiglu") != "swiglu",
        f"hidden_act={getattr(source, 'hidden_act', None)!r}": getattr(source, "hidden_act", "silu") not in SILU,
        "quantization_config is set": getattr(source, "quantization_config", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{reason}: not a Llama that maps one to one; accepted, unquantized: {ACCEPTED}")


def existing_source(source: str | PathLike[str], what: str) -> str:
    """`source` as text; a folder that is not there is an error here and not a question to the hub.

    Raises:
        FileNotFoundError: `source` is a path and no folder; the message says that it should hold `what`.
    """
    name = str(source)
    is_path = isinstance(source, PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such folder; give one that holds {what}")
    return name


@contextmanager
def naming(where: str | None) -> Iterator[None]:
    """Turn what reading a checkpoint raises into a ValueError of one line that begins with its name.

    OSError passes as it is. So does everything where there is no name: a model in memory cannot be damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{where}: the weights are damaged ({error}); copy or download them again") from error
    except _FAULTS as error:
        if where is None:
            raise
        raise ValueError(f"{where}: {' '.join(str(error).split()) or repr(error)}") from error


def require_shapes(
    cls: type[PreTrainedModel], folder: Path, config: PreTrainedConfig, *, new: re.Pattern[str] | None = None
) -> None:
    """Compare the weights in a folder with those that its configuration means, before either takes memory.

    transformers makes room for weights that a checkpoint lacks, or has in another shape, before it tells of them: a
    damaged config.json could take all memory. Nothing is compared where `folder` is none, but the name of a
    checkpoint on the hub, and where its weights have other names, as those of a model without a head.

    Args:
        cls: class of the model.
        folder: with config.json and model.safetensors, or its parts and their index.
        config: what `folder`'s config.json is read as.
        new: names of weights that the folder may lack.

    Raises:
        ValueError: a weight has another shape, or there is none.
        OSError, SafetensorError: the weights cannot be read.
    """
    found = _shapes(folder)
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    meant = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if not found.keys() & meant.keys():
        return
    if config.tie_word_embeddings:
        meant.pop("lm_head.weight", None)
    for name, shape in meant.items():
        if name not in found and not (new and new.search(name)):
            raise ValueError(_lacks(name))
        if found.get(name, shape) != shape:
            raise ValueError(_misfit(name, found[name], shape))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that transformers would read in a folder; no names where it has none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [single] if single.exists() else []
    if not paths and index.exists():
        paths = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            names = file.keys()
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def _misfit(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    shapes = f"{tuple(given)}, config.json means {tuple(expected)}"
    return f"the checkpoint's {name!r} has the shape {shapes}; weights and config.json do not belong together"


def _lacks(name: str) -> str:
    return f"the checkpoint lacks {name!r}; it must hold a whole causal language model"


@contextmanager
def _expected_report() -> Iterator[None]:
    """Silence transformers' warning about missing weights: `_check_complete` reads the same report and raises."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_complete(report: dict[str, Any]) -> None:
    """Only mixing weights may be new, and every weight of the checkpoint must have found its place."""
    lost = sorted(report["unexpected_keys"])
    missing = sorted(name for name in report["missing_keys"] if not _MIXING.search(name))
    if misfits := sorted(report["mismatched_keys"]):
        raise ValueError(_misfit(*misfits[0]))
    if lost:
        raise ValueError(f"the checkpoint has {lost[0]!r}, which a Llama has not; accepted: {ACCEPTED}")
    if missing:
        raise ValueError(_lacks(missing[0]))
