"""Language models of the MoA family: their sizes, fresh model folders, Llama checkpoints taken over."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from moa_ffn import VARIANTS
from moa_lm.encode import load_tokenizer
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.sizes import SIZES, TABLE_VARIANTS, count_parameters, named_config
from moa_train.atomic_io import new_folder

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
COLUMNS = (
    *("size", "FFN", "layers", "width", "hidden", "total", "active", "non-embedding", "mixing"),
    *("paper's total (1e9)", "ratio", "paper's active (1e9)", "ratio of active"),
)
BILLIONS = ("total", "active", "non-embedding")
"""Columns that the Markdown table shows in billions; the CSV file has them in full."""

NOTES = """
Parameters are counted exactly; total, active and non-embedding are shown in billions. `hidden` is the FFN's hidden
width, with experts that of one expert. `active` is what one token passes, embeddings included; `mixing` is what the
mixture of activations adds; ratios are ours / paper's. The paper (arXiv:2605.26647) gives names and a few counts,
not shapes. The shape of dense-0.12b and llama-large is inferred: it meets both counts to every digit when bi-MoA
mixes six activations on each branch (`g,s,r,r2,l,t`; here bimoa has our default dictionaries). All other shapes are
ours, and the paper's figures beside them are the rounded ones that it names its models by."""


class UserError(Exception):
    """Something that the user can put right; the message is one line that says how."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code (2: something the user can put right, said in one line)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        options.run(options)
    except (UserError, ValueError, OSError, StrictDataclassError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moa_lm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    sizes = commands.add_parser("sizes", help="table of the named sizes: parameters, ours beside the paper's")
    sizes.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help="these only")
    sizes.add_argument(
        "--ffn", nargs="+", choices=VARIANTS, default=list(TABLE_VARIANTS), metavar="FFN", help="these variants only"
    )
    sizes.add_argument("--csv", action="store_true", help="comma-separated values instead of Markdown")
    sizes.set_defaults(run=_sizes)

    create = commands.add_parser(
        "create",
        help="a fresh model folder",
        description="Initialize a model of a named size and save it with its tokenizer.",
        epilog=f"sizes: {', '.join(SIZES)}. FFNs: {', '.join(VARIANTS)}.",
    )
    create.add_argument("--size", required=True, choices=SIZES, metavar="SIZE", help="a named size, see `sizes`")
    create.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="folder or hub name of a tokenizer; it gives the vocabulary",
    )
    create.add_argument(
        "--vocab-multiple",
        type=int,
        default=64,
        metavar="N",
        help="pad the vocabulary to a multiple of N, for faster matrix products (default 64; 1 for none)",
    )
    create.set_defaults(run=_create)

    convert = commands.add_parser(
        "convert",
        help="a Llama checkpoint taken over",
        description="Take a Llama checkpoint's weights over into a model with any Type-II FFN. With swiglu the model "
        "is the same function; with another FFN the projections are kept and the mixing starts by its own rule.",
        epilog=f"FFNs: {', '.join(VARIANTS)}.",
    )
    convert.add_argument("checkpoint", metavar="PATH", help="folder or hub name of the checkpoint")
    convert.set_defaults(run=_convert)

    for command in (create, convert):
        command.add_argument("--ffn", required=True, choices=VARIANTS, metavar="FFN", help="variant of the FFN")
        command.add_argument(
            "--out", required=True, type=Path, metavar="DIR", help="where the model goes; new or empty"
        )
        command.add_argument("--seed", type=int, default=0, help="seed of the initialization (default 0)")
        command.add_argument(
            "--dtype", choices=DTYPES, help="of the saved weights (default: create float32, convert as is)"
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="a field of the configuration, such as ffn_mixing_gate=tanh; may be given several times",
        )
    return parser


def _sizes(options: argparse.Namespace) -> None:
    rows = list(_rows(options.size, options.ffn))
    if options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
        return
    lines = [[_shown(column, value) for column, value in zip(COLUMNS, row, strict=True)] for row in rows]
    for line in (COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *lines):
        print(f"| {' | '.join(line)} |")
    print(NOTES)


def _rows(sizes: list[str], variants: list[str]) -> Iterator[list[str | int | float | None]]:
    for name in sizes:
        size = SIZES[name]
        for variant in [v for v in variants if not size.variants or v in size.variants]:
            config = named_config(name, variant)
            count = count_parameters(config)
            hidden = config.moe_intermediate_size or config.intermediate_size
            yield [
                *(name, variant, config.num_hidden_layers, config.hidden_size, hidden, *count),
                *_beside(count.total, size.paper_total, variant),
                *_beside(count.active, size.paper_active, variant),
            ]


def _beside(ours: int, paper: dict[str, str], variant: str) -> tuple[str | None, float | None]:
    """The paper's figure with the digits that it gives, and ours over it."""
    figure = paper.get(variant, paper.get(""))
    return (None, None) if figure is None else (figure, round(ours / (float(figure) * 1e9), 4))


def _shown(column: str, value: str | float | None) -> str:
    """A cell of the Markdown table."""
    if value is None or isinstance(value, str):
        return value or ""
    if column in BILLIONS:
        return f"{value / 1e9:.5f}"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if column == "mixing" else str(value)


def _create(options: argparse.Namespace) -> None:
    _check_out(options.out)
    tokenizer = load_tokenizer(options.tokenizer)
    if options.vocab_multiple < 1:
        raise UserError(f"--vocab-multiple {options.vocab_multiple}: must be at least 1")
    fields = {
        "vocab_size": -(-len(tokenizer) // options.vocab_multiple) * options.vocab_multiple,
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
    loading = {} if options.dtype is None else {"dtype": options.dtype}
    model = MoALlamaForCausalLM.from_llama(options.checkpoint, options.ffn, **{**_settings(options.set), **loading})
    _save(model, _tokenizer_of(options.checkpoint), options.out)


def _tokenizer_of(checkpoint: str) -> PreTrainedTokenizerBase | None:
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        print(f"{checkpoint} has no tokenizer; add one to the new folder before evaluating", file=sys.stderr)
        return None
    return load_tokenizer(checkpoint)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs; a value is JSON where it can be read as such, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair}: must be FIELD=VALUE, such as ffn_mixing_gate=tanh")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; name a new one or remove it")


def _save(model: MoALlamaForCausalLM, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    count = count_parameters(model.config)
    words = f"{count.total:,} parameters, {count.mixing:,} of them mixing"
    print(f"{out}: {model.config.ffn_variant}, {words}, vocabulary {model.config.vocab_size:,}")


if __name__ == "__main__":
    sys.exit(main())
