"""Settings of every test."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are many and small; some compare bits of two shapes
os.environ.setdefault("MOA_FFN_COMPILE", "0")  # compiling costs seconds a process; tests/ffn/test_compiled.py does it

# The same examples in every run, and no limit of time for one: a busy machine may leave a test alone for seconds.
settings.register_profile("moa", deadline=None, derandomize=True, database=None)
settings.load_profile("moa")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whichever tests ran before in this process; those that need no torch do not load it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def load(name):
    """Return a module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fuzzing():
    """The module fuzzing.py: strategies for malformed files."""
    return load("fuzzing")


@pytest.fixture(scope="session")
def stopping():
    """stopping(last) is a context in which a run of this process is asked to stop in the step `last`."""
    return load("two_processes").stopping


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def fuzz(request, fuzzing):
    """`fuzzing.run`, in a short form that is always the same and a long one that is marked slow."""
    return partial(fuzzing.run, thorough=request.param == "long")


@pytest.fixture(scope="session")
def two_processes():
    """two_processes(jobs, folder) runs jobs one after the other in two gloo processes, and returns what it printed.

    A job is {"main": module or script, "arguments": [...]}, with "fsdp": True to be in shards; two_processes.py
    describes the other keys.
    """

    def launch(jobs, folder):
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(ROOT / "tests/two_processes.py"), str(folder / "jobs.json")]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    return launch
