"""The cost of moa_startup's line in Python's start-up: alone, and of whole starts with and without it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.tables import rate, report, time_ratio, times
from benchmarks.timing import Case, measure

ROOT = Path(__file__).parents[1]

HOOK_LINE = """
import sys, time, moa_startup
for _ in range({repeats}):
    sys.modules.pop("moa_startup")
    sys.meta_path = [finder for finder in sys.meta_path if finder.__module__ != "moa_startup"]
    start = time.perf_counter()
    exec({line!r})
    print(time.perf_counter() - start)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: --rounds is a tenth of the starts."""


def run(args: argparse.Namespace) -> None:
    """Measure and report."""
    line = (ROOT / "moa_startup" / "moa_startup.pth").read_text()

    def python(code: str, hook: bool) -> str:
        environment = {"MOA_STARTUP": str(int(hook)), "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout

    cpu = torch.device("cpu")
    with TemporaryDirectory() as folder:
        cases = [
            Case({"what": f"python -c pass, MOA_STARTUP={hook}"}, partial(python, "pass", bool(hook)))
            for hook in (0, 1)
        ]
        measure(cases, cpu, 10 * args.rounds, memory=False, warmup=3)
        output = python(HOOK_LINE.format(repeats=10 * args.rounds, line=line), True)
    cases.append(Case({"what": "the line alone"}, python, seconds=[float(value) for value in output.split()]))
    for case in cases:
        case.baseline = cases[0]
    report("startup: the hook", cases, [*times(), rate("starts"), *time_ratio()], cpu, args.out)
