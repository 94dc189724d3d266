"""Packs texts into token shards with a manifest and their tokenizer, which training maps into memory.

  python scripts/make_tokens.py --source texts/ --tokenizer openai-community/gpt2 --val-fraction 0.01 --out data/mine
  python scripts/make_tokens.py --source wiki.train.txt.gz --val-source wiki.valid.txt.gz --train-bpe 8192 \\
      --split-on '^ = [^=].* = $' --out data/wikitext
  python scripts/make_tokens.py --source 'corpus/*.jsonl.gz' --field body --tokenizer DIR --out data/corpus
  python scripts/make_tokens.py --source hf:HuggingFaceFW/fineweb:config=sample-10BT --tokenizer DIR --out data/web

Stopped or failed? Run the same command again: finished shards are verified and kept. The sources are read again from
their beginning, to tell that they are the same: a stream is downloaded again up to there, but not tokenized.
"""

import argparse
import os
import sys
import time
from typing import Any

from moa_lm.token_shards import Report, TokenSettings, make_tokens
from moa_train.progress import duration

_SHOWN = 10  # documents that could not be used and are printed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add(
        "--source",
        "files (.txt, .jsonl, both also .gz; .parquet), folders of them, globs "
        "| hf:NAME[:config=C][:split=S][:revision=R][:data_dir=D][:data_files=F], streamed by datasets",
        required=True,
        nargs="+",
    )
    add("--out", "folder of the data set; of train/ and val/ with held-out documents", required=True)
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", help="folder or hub name of a transformers tokenizer that has a tokenizer.json", metavar="NAME"
    )
    tokenizer.add_argument(
        "--train-bpe", help="train a byte-level BPE of so many tokens here", type=int, metavar="VOCABULARY"
    )
    add(
        "--end-of-text",
        "token of its vocabulary that ends a document (default: its eos_token); saved with it as that",
        metavar="TOKEN",
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        help="part of the documents that is held out, chosen by a hash of the text (default: none)",
        type=float,
        default=0.0,
        metavar="F",
    )
    held_out.add_argument("--val-source", help="held-out documents, named as --source", nargs="+", default=[])
    defaults = TokenSettings(tokenizer="")
    add("--field", "of a record that is its text (default: %(default)s)", default=defaults.field, metavar="NAME")
    add(
        "--split-on",
        "a line of a text file that matches begins a new document (default: a file is one)",
        metavar="REGEX",
    )
    add(
        "--shard-tokens",
        "a shard ends with the document with which it has so many (default: %(default)s)",
        type=int,
        default=defaults.shard_tokens,
        metavar="N",
    )
    add(
        "--max-tokens",
        "the training set ends with the document with which it has so many; the rest is not read (default: none)",
        type=int,
        metavar="N",
    )
    add("--workers", "processes (default: %(default)s)", type=int, default=os.cpu_count() or 1, metavar="N")
    add(
        "--max-bad",
        "unreadable documents that are put up with (default: %(default)s)",
        type=int,
        default=100,
        metavar="N",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 if it succeeded, 130 if Ctrl-C ended it."""
    given = parse(arguments)
    begin = time.monotonic()
    try:
        settings = TokenSettings(
            tokenizer=given.tokenizer,
            train_bpe=given.train_bpe,
            end_of_text=given.end_of_text,
            field=given.field,
            split_on=given.split_on,
            val_fraction=given.val_fraction,
            shard_tokens=given.shard_tokens,
            max_tokens=given.max_tokens,
        )
        reports = make_tokens(
            given.source,
            given.out,
            settings,
            val_sources=given.val_source,
            workers=given.workers,
            max_bad=given.max_bad,
        )
    except (ValueError, OSError) as error:
        print(f"make_tokens: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_tokens: stopped; the same command goes on with what is finished", file=sys.stderr)
        return 130
    tell(reports, time.monotonic() - begin)
    if given.max_tokens and reports[0].tokens < given.max_tokens:
        print(f"warning: the sources end before {given.max_tokens:,} tokens (--max-tokens)")
    return 0


def tell(reports: list[Report], seconds: float) -> None:
    """Prints what was made, what was left out, and how to train with it."""
    for report in reports:
        print(
            f"{report.folder}: {report.documents:,} documents, {report.tokens:,} tokens, "
            f"{report.bytes / report.tokens:.3f} bytes a token, in {report.shards} shards ({report.kept_shards} kept)"
        )
    for skipped in dict.fromkeys(report.skipped for report in reports):
        if skipped.empty or skipped.unusable:
            print(f"left out: {skipped.empty:,} empty documents, {skipped.unusable:,} that cannot be read")
        for entry in skipped.named[:_SHOWN]:
            print(f"  {entry['where']}: {entry['problem']}")
    print(f"vocabulary of {reports[0].vocab_size:,} tokens; {duration(seconds)}")
    train, *val = (str(report.folder) for report in reports)
    options = f"--data.train {train} " + (f"--data.val {val[0]}" if val else "--data.val null")
    print(f"to train with it: python scripts/pretrain_lm.py {options} --name NAME")


if __name__ == "__main__":
    sys.exit(main())
