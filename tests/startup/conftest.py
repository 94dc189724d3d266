"""Fresh interpreters: what the start-up hook does can only be seen in processes that have imported nothing yet."""

import os
import subprocess
import sys
import tempfile
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled():
    """Variables with which one process after another uses the same bytecode, if Python may not write it and none is
    installed."""
    installed = Path(cache_from_source(find_spec("torch").origin)).exists()
    with tempfile.TemporaryDirectory() as folder:
        shared = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        yield shared if sys.dont_write_bytecode and not installed else {}


@pytest.fixture
def python(tmp_path, compiled):
    """`python("-c", code)` runs this environment's Python, or `executable`, in an empty folder; gives the process.

    It must succeed. `path` goes to PYTHONPATH; keyword arguments in capitals go to the environment.
    """

    def run(*arguments, executable=sys.executable, path="", **variables):
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS", "MOA_STARTUP")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        searched = {"PYTHONPATH": str(path)} if path else {}
        (tmp_path / "empty").mkdir(exist_ok=True)
        process = subprocess.run(
            [str(executable), *map(str, arguments)],
            cwd=tmp_path / "empty",
            env=inherited | offline | searched | compiled | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run
