"""Compare results of lm_eval on one page; see `moa_eval.cli`."""

import sys

from moa_eval.cli import compare_evals

if __name__ == "__main__":
    sys.exit(compare_evals())
