"""Differences between resolved configs, and the role of each config key in a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Config = Mapping[str, Any]

ABSENT = "absent"
"""Value shown for a key that a config lacks."""

WITHIN_METHOD = ("identity", "bookkeeping", "peak rate")
"""Roles of the keys in which runs of one method may differ."""

# An entry that ends in a dot stands for all keys below it. Keys in none of the lists are settings of the method.
_IDENTITY = ("name", "seed", "out", "resume")
_BOOKKEEPING = (
    "data.workers", "data.cache_dir", "data.cache_gib", "data.max_bad_samples", "optim.fused",
    "loop.micro_batch_size", "loop.compile",
    "loop.log_every", "loop.val_every", "loop.num_diagnostic_samples", "checkpoint.",
    "evaluators", "loop.max_nonfinite_steps", "loop.world_size", "loop.trackers", "model.gradient_checkpointing",
)  # fmt: skip
BUDGETS = ("schedule.epochs", "schedule.steps", "schedule.tokens", "schedule.tokens_per_parameter")
_MUST_MATCH = (
    "data.", "loop.val_samples", "model.img_size", "model.mask_ratio", "model.norm_pix_loss",
    "model.encoder_args.patch_size", "model.tokenizer", "model.vocab_size", "model.args.vocab_size",
    "schedule.batch_size", *BUDGETS,
)  # fmt: skip
_WIDTHS = ("model.encoder_args.mlp_ratio", "model.args.intermediate_size", "model.args.moe_intermediate_size")
_FFN = ("model.ffn", "model.decoder_ffn", "model.args.expert_mixing", *_WIDTHS)
_SIZES = (
    "model.encoder_args.embed_dim", "model.encoder_args.depth", "model.encoder_args.num_heads",
    "model.args.hidden_size", "model.args.num_hidden_layers", "model.args.num_attention_heads",
    "model.args.num_key_value_heads", "model.args.head_dim", "model.args.num_experts",
    "model.args.num_experts_per_tok", "model.args.num_shared_experts",
)  # fmt: skip
_ROLES = {"identity": _IDENTITY, "bookkeeping": _BOOKKEEPING, "must match": _MUST_MATCH, "size": _SIZES, "FFN": _FFN}

WIDENED = {"llama-large": "dense-0.12b"}
"""Named sizes that are another size with a wider FFN."""

_ENCODER = re.compile(r"(.+_patch(\d+))_(\w+)")


class EncoderName(NamedTuple):
    """The parts of a timm name: "vit_base_patch16_qdmoa" has size "vit_base_patch16", patch 16 and FFN "qdmoa"."""

    size: str
    patch: int | None
    ffn: str


def split_encoder(name: str) -> EncoderName:
    """Split an encoder's name; a name of another form is both size and FFN, without a patch size."""
    match = _ENCODER.fullmatch(name)
    return EncoderName(match[1], int(match[2]), match[3]) if match else EncoderName(name, None, name)


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted key; an empty dictionary has no leaves."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def config_difference(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values differ, with one value per config (`ABSENT` where it lacks the key)."""
    flats = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found = {}
    for key in keys:
        if len({canonical(flat[key]) if key in flat else None for flat in flats}) > 1:
            found[key] = [flat.get(key, ABSENT) for flat in flats]
    return found


def role(key: str, values: Sequence[Any]) -> str:
    """Return what a difference in a dotted key means, given its values in the compared configs.

    One of "identity", "FFN" (its width included), "peak rate", "size" (of the model around the FFN), "bookkeeping",
    "must match" and "setting".
    """
    if key == "model.encoder":
        names = [split_encoder(str(value)) for value in values]
        if len({name.patch for name in names}) > 1:
            return "must match"
        return "FFN" if len({name.size for name in names}) == 1 else "size"
    if key == "model.size":
        return "FFN" if len({WIDENED.get(str(value), value) for value in values}) == 1 else "size"
    if key == "start_from":  # the checkpoint that a run starts from goes with its seed
        return "setting" if None in values else "identity"
    if key == "optim.lr":
        return "peak rate"
    for name, entries in _ROLES.items():
        if any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in entries):
            return name
    return "FFN" if key.split(".")[-1].startswith("ffn_") else "setting"


def method_key(config: Config) -> str:
    """Return a text that is equal for runs of one method: all keys but seed, learning rate and bookkeeping."""
    return canonical({key: value for key, value in flatten(config).items() if role(key, [value]) not in WITHIN_METHOD})


def size_part(config: Config) -> dict[str, Any]:
    """Return the keys and values that set the size of the model around the FFN."""
    flat = flatten(config)
    part = {key: flat[key] for key in _SIZES if key in flat}
    if "model.encoder" in flat:
        part["model.encoder"] = split_encoder(str(flat["model.encoder"])).size
    if "model.size" in flat:
        part["model.size"] = WIDENED.get(str(flat["model.size"]), flat["model.size"])
    return part


def ffn_part(config: Config) -> dict[str, Any]:
    """Return the keys and values that set the FFN, except its width, which goes with the size."""
    flat = flatten(config)
    keys = [key for key in flat if key != "model.size" and key not in _WIDTHS and role(key, [flat[key]]) == "FFN"]
    return {key: split_encoder(flat[key]).ffn if key == "model.encoder" else flat[key] for key in keys}


def canonical(value: Any) -> str:
    """Return a text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
