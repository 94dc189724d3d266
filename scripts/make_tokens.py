"""Pack texts into token shards for language-model training, with a manifest and their tokenizer.

  python scripts/make_tokens.py --source texts/ --tokenizer openai-community/gpt2 --val-fraction 0.01 --out data/mine
  python scripts/make_tokens.py --source wiki.train.txt.gz --val-source wiki.valid.txt.gz --train-bpe 8192 \\
      --split-on '^ = [^=].* = $' --out data/wikitext
  python scripts/make_tokens.py --source 'corpus/*.jsonl.gz' --field body --tokenizer DIR --out data/corpus
  python scripts/make_tokens.py --source hf:HuggingFaceFW/fineweb:config=sample-10BT --tokenizer DIR --out data/web

The same command resumes after a failure: finished shards are verified and kept. The sources are read again from their
beginning (streams too) to verify that they are unchanged, but not tokenized again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields

from moa_lm.token_shards import TokenSettings, make_tokens
from moa_lm.token_writer import Report
from moa_train.errors import ConfigError, DataError
from moa_train.progress import duration


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        nargs="+",
        help="files (.txt, .jsonl, both also .gz; .parquet), folders, globs, or hf:NAME[:config=C][:split=S]"
        "[:revision=R][:data_dir=D][:data_files=F], streamed by datasets",
    )
    add("--out", required=True, help="folder of the data set; with held-out documents, of train/ and val/")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name of a fast transformers tokenizer")
    tokenizer.add_argument(
        "--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE of this vocabulary size"
    )
    add("--end-of-text", metavar="TOKEN", help="token that ends a document (default: the tokenizer's eos_token)")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of held-out documents, chosen by a hash of the text (default: 0)",
    )
    held_out.add_argument("--val-source", nargs="+", default=[], help="sources of held-out documents")
    add("--field", default="text", metavar="NAME", help="text field of a record (default: %(default)s)")
    add(
        "--split-on",
        metavar="REGEX",
        help="a matching line of a text file begins a new document (default: one document per file)",
    )
    add(
        "--shard-tokens",
        type=int,
        default=TokenSettings.shard_tokens,
        metavar="N",
        help="a shard ends with the document that reaches N tokens (default: %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="the training set ends with the document that reaches N tokens (default: with the sources)",
    )
    add(
        "--max-bad",
        type=int,
        default=100,
        metavar="N",
        help="number of unreadable documents above which packing fails (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for an error of the user, 130 after Ctrl-C."""
    given = parse(arguments)
    begin = time.monotonic()
    try:
        settings = TokenSettings(**{field.name: getattr(given, field.name) for field in fields(TokenSettings)})
        reports = make_tokens(
            given.source,
            given.out,
            settings,
            val_sources=given.val_source,
            max_bad=given.max_bad,
        )
    except (ConfigError, DataError) as error:
        print(f"make_tokens: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_tokens: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print_reports(reports, time.monotonic() - begin)
    if given.max_tokens and reports[0].tokens < given.max_tokens:
        print(f"warning: the sources end before --max-tokens {given.max_tokens:,}")
    return 0


def print_reports(reports: list[Report], seconds: float) -> None:
    """Print the sizes of the data sets, the skipped documents and the command for training."""
    for report in reports:
        print(
            f"{report.folder}: {report.documents:,} documents, {report.tokens:,} tokens, "
            f"{report.bytes / report.tokens:.3f} bytes per token, {report.shards} shards ({report.kept_shards} kept)"
        )
    for source in dict.fromkeys(report.source for report in reports):
        if source.empty or source.unreadable:
            print(f"skipped {source.empty:,} empty and {source.unreadable:,} unreadable documents")
    print(f"vocabulary of {reports[0].vocab_size:,} tokens; {duration(seconds)}")
    train, *val = (str(report.folder) for report in reports)
    options = f"--data.train {train} --data.val {val[0] if val else 'null'}"
    print(f"to train: python scripts/pretrain_lm.py {options} --name NAME")


if __name__ == "__main__":
    sys.exit(main())
