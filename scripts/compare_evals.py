"""Compare results of lm_eval on one page; see `moa_eval.study`."""

import sys

from moa_eval.study import compare_evals

if __name__ == "__main__":
    sys.exit(compare_evals())
