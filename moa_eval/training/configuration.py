"""How configurations differ, and what a difference in a key means for a comparison."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moa_eval.training.runs import split_encoder

ABSENT = "absent"  # stands for the value of a key that a configuration lacks

# A name that ends in a dot stands for all keys below it. Keys in none of the lists are settings of the method.
_IDENTITY = ("name", "seed", "out", "resume")
_BOOKKEEPING = (
    "data.workers", "data.cache_dir", "data.cache_gib", "data.max_bad_samples", "optim.fused",
    "loop.micro_batch_size", "loop.compile",
    "loop.log_every", "loop.val_every", "loop.num_diagnostic_samples", "checkpoint.",
    "loop.max_nonfinite_steps", "loop.world_size", "loop.trackers", "model.gradient_checkpointing",
)  # fmt: skip
BUDGETS = ("schedule.epochs", "schedule.steps", "schedule.tokens", "schedule.tokens_per_parameter")
_MUST_MATCH = (
    "data.", "loop.val_samples", "model.img_size", "model.mask_ratio", "model.norm_pix_loss",
    "model.encoder_args.patch_size", "model.tokenizer", "model.vocab_size", "model.args.vocab_size",
    "schedule.batch_size", *BUDGETS,
)  # fmt: skip
_WIDTHS = ("model.encoder_args.mlp_ratio", "model.args.intermediate_size", "model.args.moe_intermediate_size")
_FFN = ("model.ffn", "model.decoder_ffn", "model.args.expert_mixing", *_WIDTHS)
_SIZES = tuple(
    f"model.{place}.{key}"
    for place, keys in (
        ("encoder_args", ("embed_dim", "depth", "num_heads")),
        ("args", ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")),
        ("args", ("num_experts", "num_experts_per_tok", "num_shared_experts")),
    )
    for key in keys
)
WIDENED = {"llama-large": "dense-0.12b"}  # named sizes that are another one with a wider FFN


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; an empty dictionary has none, as if its key were absent."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_difference(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys whose values are not all equal, with one value per configuration (or `ABSENT`)."""
    flats = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat)  # the order of first appearance
    found = {}
    for key in keys:
        texts = {canonical(flat[key]) if key in flat else None for flat in flats}
        if len(texts) > 1:
            found[key] = [flat.get(key, ABSENT) for flat in flats]
    return found


def role(key: str, values: Sequence[Any]) -> str:
    """What a difference in a key means.

    Returns:
        "identity", "FFN" (its width included), "peak rate", "size" (of the model around the FFN), "bookkeeping",
        "must match" or "setting".
    """
    if key == "model.encoder":
        names = [split_encoder(str(value)) for value in values]
        if len({name.patch for name in names}) > 1:
            return "must match"
        return "FFN" if len({name.size for name in names}) == 1 else "size"
    if key == "model.size":
        return "FFN" if len({WIDENED.get(str(value), value) for value in values}) == 1 else "size"
    if key == "start_from":  # a run begins with another's checkpoint or anew; with whose, is a matter of its seed
        return "setting" if None in values else "identity"
    if key == "optim.lr":
        return "peak rate"
    for name, keys in (
        ("identity", _IDENTITY), ("bookkeeping", _BOOKKEEPING), ("must match", _MUST_MATCH), ("size", _SIZES),
    ):  # fmt: skip
        if any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in keys):
            return name
    return "FFN" if key.split(".")[-1].startswith("ffn_") or key in _FFN else "setting"


def size_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes the size of the model around its FFN: dotted keys and values."""
    flat = flatten(config)
    own = {key: flat[key] for key in _SIZES if key in flat}
    if "model.encoder" in flat:
        own["model.encoder"] = split_encoder(str(flat["model.encoder"])).size
    if "model.size" in flat:
        own["model.size"] = WIDENED.get(str(flat["model.size"]), flat["model.size"])
    return own


def ffn_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes its FFN but for the width, which goes with the size: dotted keys and values."""
    flat = flatten(config)
    keys = [key for key in flat if key != "model.size" and key not in _WIDTHS and role(key, [flat[key]]) == "FFN"]
    return {key: split_encoder(flat[key]).ffn if key == "model.encoder" else flat[key] for key in keys}


def canonical(value: Any) -> str:
    """A value as text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
