"""Settings of every test."""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("MOA_FFN_COMPILE", "0")  # compiling costs seconds a process; tests/ffn/test_compiled.py does it


@pytest.fixture(scope="session")
def fuzzing():
    """The module fuzzing.py: strategies for malformed files."""
    spec = importlib.util.spec_from_file_location("fuzzing", Path(__file__).with_name("fuzzing.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def fuzz(request, fuzzing):
    """`fuzzing.run`, in a short form that is always the same and a long one that is marked slow."""
    return partial(fuzzing.run, thorough=request.param == "long")
