"""Compare training runs on one page; see `moa_eval.study`."""

import sys

from moa_eval.study import compare_runs

if __name__ == "__main__":
    sys.exit(compare_runs())
