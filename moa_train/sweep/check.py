"""Every run's configuration and folder, checked before the first run starts, so that a typo costs nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from moa_train.run_folder import RunFolder
from moa_train.sweep.grid import PlannedRun
from moa_train.sweep.state import DONE, Job

Main = Callable[[Sequence[str]], Any]
"""A training script's function main(arguments), which parses them with `moa_train.config.parse_config`."""


def load_main(script: Path) -> Main:
    """Return the function `main(arguments)` of a training script. Raises ValueError if there is none."""
    name = f"swept_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    if spec is None or spec.loader is None or not script.is_file():
        raise ValueError(f"--script is {str(script)!r}; it must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise ValueError(f"--script {script} has no function main(arguments), as scripts/pretrain_mae.py has")
    return module.main


def check(runs: Sequence[PlannedRun], main: Main, mutable_keys: frozenset[str]) -> list[Job]:
    """Return a job for each run; those that are done, with the configuration of today, are marked as skipped.

    Args:
        runs: The runs.
        main: The training script's function.
        mutable_keys: Keys that may change when a run is resumed.

    Raises:
        ValueError: a key, type or value that cannot be, or a folder that holds another run; the message names it.
    """
    jobs = []
    for run in runs:
        tree = resolve(run, main)
        changed = RunFolder(run.folder).check(tree, tree["resume"], mutable_keys)
        job = Job(run)
        job.look()
        if job.progress.state in DONE and not changed:  # else the run itself is asked, with --resume force
            job.state, job.skipped = job.progress.state, True
        jobs.append(job)
    return jobs


def resolve(run: PlannedRun, main: Main) -> dict[str, Any]:
    """Return the run's whole configuration, as the training script resolves and checks it.

    Raises:
        ValueError: the run cannot be: a key, a value, missing data; the message is the script's own.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([*run.arguments, "--check"])
    except SystemExit as ended:
        if ended.code:
            message = re.sub(r"^\S+: error: ", "", err.getvalue().strip())  # without the script's name
            raise ValueError(f"{run.name}: {message}") from None
    tree = yaml.safe_load(out.getvalue())
    if not isinstance(tree, dict):
        raise ValueError(f"{run.name}: the training script does not print its configuration when asked to --check it")
    return tree
