"""Compare training runs on one page; see `moa_eval.cli`."""

import sys

from moa_eval.cli import compare_runs

if __name__ == "__main__":
    sys.exit(compare_runs())
