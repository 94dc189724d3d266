"""Commands compare_runs.py and compare_evals.py: sections of training runs and harness results on one page."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moa_eval.page.writing import Section, write_page
from moa_eval.training.readme import results_markdown
from moa_eval.training.report import training_section
from moa_eval.zero_shot.report import zero_shot_section
from moa_train.errors import ConfigError, DataError

Builder = Callable[..., Section]


class _Request(NamedTuple):
    """A requested section: its builder, its title (None for the default), and its inputs."""

    build: Builder
    title: str | None
    paths: list[str]


class _AddRequest(argparse.Action):
    """Option `--name TITLE PATH ...` that appends a `_Request` with the builder given as `const`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """Append the request."""
        if len(values) < 2:
            parser.error(f"{option} {values[0]}: give a title and at least one path")
        namespace.requests = [*namespace.requests, _Request(self.const, values[0], values[1:])]


def compare_runs(arguments: Sequence[str] | None = None) -> int:
    """Compare training runs; return the exit code (2: a run is unusable or not comparable)."""
    parser = _parser(
        "compare_runs.py",
        "Compare training runs on one page: loss, learning rates, cost, reconstructions, mixing, config differences.",
        "A RUN is a run folder, or a folder of run folders (a sweep). The first run belongs to the baseline.",
    )
    parser.add_argument("paths", nargs="*", metavar="RUN", help="run folder, or folder of run folders")
    _add_section(parser, "--section", "RUN", training_section, "add a section of training runs")
    _add_section(parser, "--evals", "RESULT", zero_shot_section, "add a section of lm_eval results")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="baseline: an FFN (swiglu), a label of the page, or a run; may be repeated, each section takes the first "
        "that it has",
    )
    parser.add_argument("--strict", action="store_true", help="fail if runs differ in data, masks, batch or budget")
    parser.add_argument("--table", metavar="CSV", help="print a report's tables/losses.csv as Markdown and exit")
    options = parser.parse_intermixed_args(arguments)
    if options.table:
        return _exit_code(parser, lambda: print(results_markdown(options.table), end=""))
    return _write(parser, options, training_section, {"strict": options.strict, "baseline": options.baseline})


def compare_evals(arguments: Sequence[str] | None = None) -> int:
    """Compare harness results; return the exit code (2: results are unusable or not comparable)."""
    parser = _parser(
        "compare_evals.py",
        "Compare lm_eval results: zero-shot table and paired tests of the differences.",
        "A RESULT is the output of `lm_eval ... --output_path DIR --log_samples`: DIR, a model's folder in it, or a\n"
        "results file. The first is the baseline. Differences are tested over the same items.",
    )
    parser.add_argument("paths", nargs="*", metavar="RESULT", help="folder or results_*.json")
    _add_section(parser, "--section", "RESULT", zero_shot_section, "add a section of lm_eval results")
    _add_section(parser, "--runs", "RUN", training_section, "add a section of training runs")
    parser.add_argument(
        "--baseline", metavar="NAME", help="baseline: a model's name, or one of the paths (default: the first)"
    )
    options = parser.parse_intermixed_args(arguments)
    return _write(parser, options, zero_shot_section, {"baseline": options.baseline})


def _parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", help="output folder of index.html, summary.md, figures/ and tables/")
    parser.add_argument("--title", help="title of the page (default: the titles of the sections)")
    parser.set_defaults(requests=[])
    return parser


def _add_section(parser: argparse.ArgumentParser, option: str, metavar: str, build: Builder, words: str) -> None:
    settings = {"nargs": "+", "metavar": ("TITLE", metavar), "help": f"{words}; may be repeated"}
    parser.add_argument(option, action=_AddRequest, const=build, **settings)


def _write(parser: argparse.ArgumentParser, options: Any, build: Builder, own: dict[str, Any]) -> int:
    """Write the page; `own` are options that apply to the sections made by `build`."""
    requests: list[_Request] = [*([_Request(build, None, options.paths)] if options.paths else []), *options.requests]
    if not requests or options.out is None:
        parser.error("give what to compare, and --out DIR")

    def write() -> None:
        sections: list[Section] = []
        for request in requests:
            slug = _slug(request.title or request.build.__name__, [section.slug for section in sections])
            extra = own if request.build is build else {}
            sections.append(request.build(request.paths, slug=slug, title=request.title, **extra))
        title = options.title or "; ".join(section.title for section in sections)
        page = write_page(sections, options.out, title=title, command=f"scripts/{parser.prog}")
        for section in sections:
            heading = [f"{section.title}:"] if len(sections) > 1 else []
            print(*heading, *section.verdict)
        print(page)

    return _exit_code(parser, write)


def _exit_code(parser: argparse.ArgumentParser, action: Callable[[], None]) -> int:
    """Run an action; return 0, or 2 after printing a user's error in one line."""
    try:
        action()
    except (ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _slug(title: str, taken: Sequence[str]) -> str:
    """Return a short name for files and ids, different from those taken."""
    plain = re.sub(r"[^a-z0-9]+", "-", title.lower().removesuffix("_section")).strip("-")
    plain = plain if plain[:1].isalpha() else f"section-{plain}".rstrip("-")
    candidates = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 2))]
    return next(slug for slug in candidates if slug not in taken)
