"""How configurations differ, and what a difference in a key means for a comparison."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moa_eval.training.runs import split_encoder

ABSENT = "absent"  # stands for the value of a key that a configuration lacks

# A name that ends in a dot stands for all keys below it. Keys in none of the lists are settings of the method.
_IDENTITY = ("name", "seed", "out", "resume")
_BOOKKEEPING = (
    "data.workers", "data.cache_dir", "data.max_bad_samples", "optim.fused", "loop.micro_batch_size", "loop.compile",
    "loop.log_every", "loop.val_every", "loop.visualize", "loop.save_every", "loop.keep", "loop.trackers",
)  # fmt: skip
_MUST_MATCH = (
    "data.", "loop.val_samples", "model.img_size", "model.mask_ratio", "model.norm_pix_loss",
    "model.encoder_args.patch_size", "model.tokenizer", "model.vocab_size", "schedule.batch_size", "schedule.epochs",
    "schedule.steps", "schedule.tokens",
)  # fmt: skip
_FFN = ("model.ffn", "model.decoder_ffn", "model.encoder_args.mlp_ratio")


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
    """What a difference in a key means: "identity", "FFN", "peak rate", "bookkeeping", "must match" or "setting"."""
    if key == "model.encoder":
        names = [split_encoder(str(value)) for value in values]
        if len({name.patch for name in names}) > 1:
            return "must match"
        return "FFN" if len({name.size for name in names}) == 1 else "setting"
    if key == "optim.lr":
        return "peak rate"
    for name, keys in (("identity", _IDENTITY), ("bookkeeping", _BOOKKEEPING), ("must match", _MUST_MATCH)):
        if any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in keys):
            return name
    return "FFN" if key.split(".")[-1].startswith("ffn_") or key in _FFN else "setting"


def canonical(value: Any) -> str:
    """A value as text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
