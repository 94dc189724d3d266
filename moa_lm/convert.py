"""Conversion of Llama-family checkpoints: the same weights with any Type-II FFN of the family."""

from __future__ import annotations

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
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from moa_ffn import FFNSpec
from moa_lm.configuration import SILU, MoALlamaConfig, build_config
from moa_train.errors import ConfigError, DataError

Model = TypeVar("Model", bound=PreTrainedModel)

ACCEPTED = "llama; mistral without a sliding window; moa_llama with ffn_variant swiglu"
"""Architectures whose weights map one to one."""

_CONFIG_LOADING = ("revision", "token", "cache_dir", "local_files_only")

LOADING = ("dtype", "device_map", "max_memory", "offload_folder", "attn_implementation", *_CONFIG_LOADING)
"""Arguments of `from_llama` that belong to `from_pretrained`; all others are fields of the configuration."""

_SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("num_experts", "num_shared_experts", "moe_intermediate_size"),
)
_FUNCTION = (
    *("model_type", "rms_norm_eps", "rope_parameters", "num_experts_per_tok", "norm_topk_prob", "expert_mixing"),
    *("ffn_variant", "ffn_mixing_gate", "ffn_gate_activations", "ffn_up_activations", "ffn_mixed_branch"),
    *("ffn_mix_bias", "ffn_mix_base", "ffn_anchor"),
)
"""Fields that change what the same weights compute."""

_NOT_CARRIED = ("transformers_version", "architectures", "dtype")
_MIXING = re.compile(r"\.mix_(proj|coef)\b|\.mix_proj_bias\b|\.act_param\b")


def from_llama(
    cls: type[Model],
    source: str | PathLike[str] | PreTrainedModel,
    variant: str = "swiglu",
    **settings: Any,
) -> Model:
    """Convert a checkpoint or model; see `MoALlamaForCausalLM.from_llama`."""
    loading = {name: settings.pop(name) for name in LOADING if name in settings}
    common = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_complete` raises instead
    if isinstance(source, PreTrainedModel):
        config = converted_config(source.config, variant, **settings)
        weights = {name: weight.detach().clone() for name, weight in source.state_dict().items()}
        given = {"dtype": source.dtype, "device_map": source.device} | loading
        model = _load(cls, None, config=config, state_dict=weights, **given, **common)
        if source.generation_config is not None:
            model.generation_config = copy.deepcopy(source.generation_config)
        return model
    name = existing_source(source, "a Llama checkpoint")
    original = _read_config(name, {key: loading[key] for key in _CONFIG_LOADING if key in loading})
    config = converted_config(original, variant, **settings)
    config.dtype = original.dtype
    given = {"dtype": "auto", "use_safetensors": True} | loading
    try:
        return _load(cls, name, config=config, **given, **common)
    except SafetensorError as error:
        raise DataError(f"{name}: the weights are damaged ({error}); copy or download them again") from error


def converted_config(source: PreTrainedConfig, variant: str, **overrides: Any) -> MoALlamaConfig:
    """Return the configuration of `source` with `variant` as its FFN.

    Args:
        source: Configuration of one of the architectures in `ACCEPTED`.
        variant: A Type-II member of `moa_ffn.VARIANTS`.
        overrides: Fields to set, such as ffn_mixing_gate; those that change the shape of a weight are refused.

    Raises:
        ConfigError: The source cannot be converted, or a setting is invalid.
    """
    _check_source(source)
    if not FFNSpec(variant).type_two:
        raise ConfigError(
            f"variant is {variant!r}, a Type-I FFN without the up branch that Llama's up_proj needs; use a Type-II "
            "variant such as swiglu or qdmoa"
        )
    names = {field.name for field in fields(MoALlamaConfig)}
    for name, value in overrides.items():
        if name in _SHAPES:
            raise ConfigError(f"{name} is {value!r}, but the checkpoint decides it; leave it out")
        if name not in names:
            allowed = ", ".join(sorted((names | set(LOADING)) - set(_SHAPES)))
            raise ConfigError(f"unknown setting {name!r}; allowed: {allowed}")
    carried = {name: value for name, value in source.to_dict().items() if name in names and name not in _NOT_CARRIED}
    return build_config(**{**carried, **overrides, "ffn_variant": variant})


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load the weights of a folder of the same class and architecture into `model`.

    Raises:
        ConfigError: The folder's configuration is another architecture; the message gives the first difference.
        DataError: The folder cannot be loaded.
    """
    name = existing_source(folder, "a model")
    theirs, ours = _read_config(name, {}).to_dict(), model.config.to_dict()
    for key in (*_SHAPES, *_FUNCTION):
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"{name} has {key} {theirs.get(key)!r}, the model {ours.get(key)!r}; set model.args to match"
            )
    model.load_state_dict(_load(type(model), name, output_loading_info=True, use_safetensors=True).state_dict())


def existing_source(source: str | PathLike[str], what: str) -> str:
    """Return `source` as text. Raises DataError if it is a path, not a Hub name, and no such folder exists."""
    name = str(source)
    is_path = isinstance(source, PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise DataError(f"{name}: no such folder; pass one that holds {what}")
    return name


def require_shapes(cls: type[PreTrainedModel], folder: Path, config: PreTrainedConfig) -> None:
    """Raise DataError unless the weights in a folder have the shapes of its configuration.

    Nothing is allocated. Weights that are not in local safetensors files are not compared.

    Args:
        cls: Class of the model.
        folder: Folder with model.safetensors, or its parts and their index.
        config: Configuration of the folder.
    """
    found = _shapes(folder)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in cls(copy.deepcopy(config)).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for name, shape in expected.items() if found.keys() & expected.keys() else ():
        if name not in found:
            raise _missing(str(folder), name)
        if found[name] != shape:
            raise _mismatch(str(folder), name, found[name], shape)


def _read_config(name: str, loading: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **loading)
    except Exception as error:  # transformers raises many types for a damaged config.json
        raise DataError(f"{name}: cannot read config.json ({' '.join(str(error).split())})") from error


def _check_source(source: PreTrainedConfig) -> None:
    kind = source.model_type
    window = getattr(source, "sliding_window", None)
    variant, act = getattr(source, "ffn_variant", "swiglu"), getattr(source, "hidden_act", "silu")
    reasons = {
        f"model_type is {kind!r}": kind not in ("llama", "mistral", "moa_llama"),
        f"sliding_window is {window}": kind == "mistral" and window is not None,
        f"ffn_variant is {variant!r}": variant != "swiglu",
        f"hidden_act is {act!r}": act not in SILU,
        "quantization_config is set": getattr(source, "quantization_config", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"{reason}: the weights do not map one to one; accepted, unquantized: {ACCEPTED}")


def _load(cls: type[Model], name: str | None, **arguments: Any) -> Model:
    with _without_warnings():
        loaded = cls.from_pretrained(name, **arguments)
    model, report = cast("tuple[Model, dict[str, Any]]", loaded)
    _check_complete(name or "the model", report)
    return model


def _check_complete(source: str, report: dict[str, Any]) -> None:
    """Raise DataError unless only mixing weights are new and every weight of the source was used."""
    if mismatched := sorted(report["mismatched_keys"]):
        raise _mismatch(source, *mismatched[0])
    if unexpected := sorted(report["unexpected_keys"]):
        raise DataError(f"{source} has {unexpected[0]!r}, which is not a weight of Llama; accepted: {ACCEPTED}")
    if missing := sorted(name for name in report["missing_keys"] if not _MIXING.search(name)):
        raise _missing(source, missing[0])


def _mismatch(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> DataError:
    shapes = f"has the shape {tuple(found)}, config.json means {tuple(expected)}"
    return DataError(f"{source}: {name!r} {shapes}; weights and config.json are of different models")


def _missing(source: str, name: str) -> DataError:
    return DataError(f"{source} lacks {name!r}; it must hold a whole causal language model")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the safetensors weights in a folder, by name."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [single] if single.exists() else []
    if not paths and index.exists():
        paths = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warnings about missing weights: `_check_complete` raises for them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
