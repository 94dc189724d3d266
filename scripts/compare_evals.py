"""Compare results of lm_eval: the zero-shot table, and whether a difference means anything (paired over the items).

A RESULT is what `lm_eval ... --output_path DIR --log_samples` wrote: DIR, a model's folder in it, or a results file.
"""

import argparse
import sys

from moa_eval.training.comparison import NotComparableError
from moa_eval.zero_shot.output import ResultsError
from moa_eval.zero_shot.report import write_zero_shot


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the report and return the exit code (2: results cannot be read or compared)."""
    parser = argparse.ArgumentParser(
        prog="compare_evals.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="folder or results_*.json; the first is the baseline"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="where index.html, zero_shot.md, zero_shot.csv, paired.csv and figures/ go",
    )  # fmt: skip
    parser.add_argument("--title", help="title of the page (default: the models' names)")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="what to compare with: a model's name, or one of the paths (default: the first)",
    )
    options = parser.parse_args(arguments)
    try:
        report = write_zero_shot(options.results, options.out, title=options.title, baseline=options.baseline)
    except (ResultsError, NotComparableError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(report.summary)
    print(report.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
