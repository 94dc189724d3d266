"""A Llama-family checkpoint taken over: the same weights, any Type-II FFN of the family."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors import SafetensorError
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
        original = AutoConfig.from_pretrained(source_name, trust_remote_code=False, **remote)
        config = converted_config(original, variant, **settings)
        loading = {"dtype": "auto", "use_safetensors": True} | loading
        config.dtype = original.dtype
    loading |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_complete` says it in words
    try:
        with _expected_report():
            loaded = cls.from_pretrained(source_name, config=config, **loading)
    except SafetensorError as error:
        raise ValueError(f"{source_name}: the weights are damaged ({error}); copy or download them again") from error
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
        overrides: fields to set, such as ffn_gate; those that change the shape of a weight are not allowed.

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
        name, given, expected = misfits[0]
        shapes = f"{tuple(given)}, config.json means {tuple(expected)}"
        raise ValueError(
            f"the checkpoint's {name!r} has the shape {shapes}; weights and config.json do not belong together"
        )
    if lost:
        raise ValueError(f"the checkpoint has {lost[0]!r}, which a Llama has not; accepted: {ACCEPTED}")
    if missing:
        raise ValueError(f"the checkpoint lacks {missing[0]!r}; it must hold a whole causal language model")
