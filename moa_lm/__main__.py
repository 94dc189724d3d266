"""Language models of the MoA family: named sizes, new model folders, converted Llama checkpoints, demo data."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from moa_ffn import VARIANTS
from moa_lm.encode import load_tokenizer
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.sizes import SIZES, TABLE_VARIANTS, count_parameters, named_config, padded_vocab
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.atomic_io import new_folder
from moa_train.errors import ConfigError, DataError, require

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
COLUMNS = ("size", "FFN", "layers", "width", "hidden", "total", "active", "non-embedding", "mixing")

TALES = Path(__file__).parent / "texts" / "tales.jsonl.gz"
TALES_SETTINGS = TokenSettings(train_bpe=2048, val_fraction=0.1)

NOTES = """
total, active and non-embedding are exact counts in billions. `hidden` is the hidden width of the FFN, with experts that
of one expert. `active` counts the parameters that process one token, embeddings included; `mixing` those of the mixture
of activations. docs/language-models.md compares them with the paper's."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 for an error of the user, printed in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        options.run(options)
    except (ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moa_lm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    sizes = commands.add_parser("sizes", help="table of the named sizes and their parameter counts")
    sizes.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help="only these sizes")
    sizes.add_argument(
        "--ffn", nargs="+", choices=VARIANTS, default=list(TABLE_VARIANTS), metavar="FFN", help="only these variants"
    )
    sizes.set_defaults(run=_sizes)

    create = commands.add_parser(
        "create",
        help="create a model folder with random weights",
        description="Initialize a model of a named size and save it with its tokenizer.",
        epilog=f"sizes: {', '.join(SIZES)}. FFNs: {', '.join(VARIANTS)}.",
    )
    create.add_argument("--size", required=True, choices=SIZES, metavar="SIZE", help="named size, see `sizes`")
    create.add_argument(
        "--tokenizer", required=True, metavar="NAME", help="folder or Hub name of the tokenizer, for the vocabulary"
    )
    create.set_defaults(run=_create)

    convert = commands.add_parser(
        "convert",
        help="convert a Llama checkpoint",
        description="Convert a Llama checkpoint to a model with any Type-II FFN. With swiglu the model is the same "
        "function; with another FFN the projections are kept and the mixing is initialized by its own rule, or with "
        "--preserve so that the model stays the same function.",
        epilog=f"FFNs: {', '.join(VARIANTS)}.",
    )
    convert.add_argument("checkpoint", metavar="NAME", help="folder or Hub name of the checkpoint")
    convert.add_argument(
        "--preserve", action="store_true", help="keep the function: the mixture starts as SwiGLU (ffn_mix_base=anchor)"
    )
    convert.set_defaults(run=_convert)

    for command in (create, convert):
        command.add_argument("--ffn", required=True, choices=VARIANTS, metavar="FFN", help="variant of the FFN")
        command.add_argument(
            "--out", required=True, type=Path, metavar="DIR", help="destination, a new or empty folder"
        )
        command.add_argument("--seed", type=int, default=0, help="seed of the initialization (default: %(default)s)")
        command.add_argument(
            "--dtype", choices=DTYPES, help="dtype of the saved weights (default: float32, or the checkpoint's)"
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="field of the configuration, such as ffn_mixing_gate=tanh; repeatable",
        )

    tales = commands.add_parser("tales", help="make the token shards of the demo from the texts of this package")
    tales.add_argument("--out", type=Path, default=Path("data/tales"), help="destination (default: %(default)s)")
    tales.set_defaults(run=lambda options: make_tokens([str(TALES)], options.out, TALES_SETTINGS))
    return parser


def _sizes(options: argparse.Namespace) -> None:
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---:|" * (len(COLUMNS) - 2))
    for name in options.size:
        for variant in (variant for variant in options.ffn if variant in (SIZES[name].variants or VARIANTS)):
            config = named_config(name, variant)
            *counts, mixing = count_parameters(config)
            hidden = config.moe_intermediate_size or config.intermediate_size
            shape = (config.num_hidden_layers, config.hidden_size, hidden)
            cells = (name, variant, *shape, *(f"{count / 1e9:.5f}" for count in counts), f"{mixing:,}")
            print(f"| {' | '.join(map(str, cells))} |")
    print(NOTES)


def _create(options: argparse.Namespace) -> None:
    _check_out(options.out)
    tokenizer = load_tokenizer(options.tokenizer)
    fields = {
        "vocab_size": padded_vocab(len(tokenizer)),
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **_settings(options.set),
    }
    config = named_config(options.size, options.ffn, **fields)
    torch.manual_seed(options.seed)
    model = MoALlamaForCausalLM(config).to(getattr(torch, options.dtype or "float32"))
    _save(model, tokenizer, options.out)


def _convert(options: argparse.Namespace) -> None:
    _check_out(options.out)
    torch.manual_seed(options.seed)
    settings = _settings(options.set) | ({} if options.dtype is None else {"dtype": options.dtype})
    if options.preserve:
        settings["ffn_mix_base"] = "anchor"
    model = MoALlamaForCausalLM.from_llama(options.checkpoint, options.ffn, **settings)
    _save(model, _tokenizer_of(options.checkpoint), options.out)


def _tokenizer_of(checkpoint: str) -> PreTrainedTokenizerBase | None:
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        print(f"{checkpoint} has no tokenizer; add one to the new folder before evaluating", file=sys.stderr)
        return None
    return load_tokenizer(checkpoint)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Parse FIELD=VALUE pairs; a value that is not JSON is text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        require("--set", pair, bool(equals and name), "FIELD=VALUE, such as ffn_mixing_gate=tanh")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def _check_out(out: Path) -> None:
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require("--out", str(out), free, "a new or empty folder")


def _save(model: MoALlamaForCausalLM, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    count = count_parameters(model.config)
    size = f"{count.total:,} parameters ({count.mixing:,} mixing)"
    print(f"{out}: {model.config.ffn_variant}, {size}, vocabulary {model.config.vocab_size:,}")


if __name__ == "__main__":
    sys.exit(main())
