"""Compare training runs on one page: loss, cost, reconstructions, and what differs between them."""

import argparse
import sys

from moa_eval.training.comparison import NotComparableError
from moa_eval.training.report import write_report
from moa_eval.training.runs import RunFolderError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the report and return the exit code (2: a run cannot be read or compared)."""
    parser = argparse.ArgumentParser(prog="compare_runs.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; the first is the baseline")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where index.html, summary.md, figures/ and tables/ go"
    )
    parser.add_argument("--title", help="title of the page (default: the names of the FFNs)")
    parser.add_argument(
        "--strict", action="store_true", help="refuse runs that differ in data, masks, batch or budget"
    )
    options = parser.parse_args(arguments)
    try:
        report = write_report(options.runs, options.out, title=options.title, strict=options.strict)
    except (RunFolderError, NotComparableError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(report.verdict)
    print(report.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
