"""Compare results of lm-eval on one page; see `moa_eval.cli`."""

from __future__ import annotations

import sys

from moa_eval.cli import compare_evals

if __name__ == "__main__":
    sys.exit(compare_evals())
