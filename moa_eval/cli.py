"""The command lines of compare_runs.py and compare_evals.py: sections of runs and harness results -> one page."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moa_eval.page.writing import Section, write_page
from moa_eval.training.comparison import NotComparableError
from moa_eval.training.reading import RunFolderError
from moa_eval.training.readme import results_markdown
from moa_eval.training.report import training_section
from moa_eval.zero_shot.report import zero_shot_section
from moa_train.errors import ConfigError, DataError

READABLE = (
    ConfigError,
    DataError,
    RunFolderError,
    NotComparableError,
    OSError,
)  # said in one line, without a traceback


class _Request(NamedTuple):
    """A section as asked for: its maker, its title (None: from what it shows), and what goes into it."""

    make: Callable[..., Section]
    title: str | None
    paths: list[str]


def compare_runs(arguments: Sequence[str] | None = None) -> int:
    """Compare training runs; return the exit code (2: a run cannot be read or compared)."""
    parser = _parser(
        "compare_runs.py",
        "Compare training runs on one page: loss, learning rates, cost, reconstructions, mixing, and what differs.",
        "A RUN is a run folder, or a folder that holds run folders (a sweep's). The first belongs to the baseline.",
    )
    parser.add_argument("paths", nargs="*", metavar="RUN", help="run folder, or folder of run folders")
    _add_section(parser, "--section", "RUN", training_section, "a further section of runs, with a heading of its own")
    _add_section(parser, "--evals", "RESULT", zero_shot_section, "a section of lm_eval's results")
    parser.add_argument(
        "--baseline",
        action="append",
        metavar="NAME",
        help="what to compare with: an FFN (swiglu), a label of the page, or a run; if repeated, each section takes "
        "the first that it has",
    )
    parser.add_argument("--strict", action="store_true", help="refuse runs that differ in data, masks, batch or budget")
    parser.add_argument(
        "--table", metavar="CSV", help="only print the results of a report's tables/losses.csv as a Markdown table"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.table:
        return _attempt(parser, lambda: print(results_markdown(options.table), end=""))
    own = {"strict": options.strict, "baseline": options.baseline}
    return _write(parser, options, training_section, own)


def compare_evals(arguments: Sequence[str] | None = None) -> int:
    """Compare harness results; return the exit code (2: results cannot be read or compared)."""
    parser = _parser(
        "compare_evals.py",
        "Compare results of lm_eval: the zero-shot table, and whether a difference means anything.",
        "A RESULT is what `lm_eval ... --output_path DIR --log_samples` wrote: DIR, a model's folder in it, or a\n"
        "results file. The first is the baseline. Differences are tested over the same items.",
    )
    parser.add_argument("paths", nargs="*", metavar="RESULT", help="folder or results_*.json")
    _add_section(parser, "--section", "RESULT", zero_shot_section, "a further section of results, with its own heading")
    _add_section(parser, "--runs", "RUN", training_section, "a section of training runs")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="what to compare with: a model's name, or one of the paths (default: the first)",
    )
    options = parser.parse_intermixed_args(arguments)
    return _write(parser, options, zero_shot_section, {"baseline": options.baseline})


def _parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", help="where index.html, summary.md, figures/ and tables/ go")
    parser.add_argument("--title", help="title of the page (default: the names of what is compared)")
    parser.set_defaults(requests=[])
    return parser


def _add_section(
    parser: argparse.ArgumentParser, option: str, metavar: str, make: Callable[..., Section], words: str
) -> None:
    class Add(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            if len(values) < 2:
                parser.error(f"{option} {values[0]}: give a title and at least one {metavar}")
            namespace.requests = [*namespace.requests, _Request(make, values[0], values[1:])]

    parser.add_argument(option, action=Add, nargs="+", metavar=("TITLE", metavar), help=f"{words}; may be repeated")


def _write(
    parser: argparse.ArgumentParser, options: argparse.Namespace, make: Callable[..., Section], own: dict[str, Any]
) -> int:
    first = [_Request(make, None, options.paths)] if options.paths else []
    requests: list[_Request] = [*first, *options.requests]
    if not requests or options.out is None:
        parser.error("give what to compare, and --out DIR")

    def write() -> None:
        sections: list[Section] = []
        for request in requests:
            taken = [section.slug for section in sections]
            extra = own if request.make is make else {}  # a baseline's name means something in sections of one kind
            slug = _slug(request.title or make.__name__.removesuffix("_section"), taken)
            sections.append(request.make(request.paths, slug=slug, title=request.title, **extra))
        title = options.title or "; ".join(section.title for section in sections)
        page = write_page(sections, options.out, title=title, command=f"scripts/{parser.prog}")
        for section in sections:
            print(" ".join(section.verdict) if len(sections) == 1 else f"{section.title}: {' '.join(section.verdict)}")
        print(page)

    return _attempt(parser, write)


def _attempt(parser: argparse.ArgumentParser, action: Callable[[], None]) -> int:
    try:
        action()
    except READABLE as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _slug(title: str, taken: Sequence[str]) -> str:
    """A short name for files and ids, different from those that are taken."""
    plain = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    plain = plain if plain[0].isalpha() else f"section-{plain}"
    numbered = (f"{plain}-{number}" if number > 1 else plain for number in range(1, len(taken) + 2))
    return next(slug for slug in numbered if slug not in taken)
