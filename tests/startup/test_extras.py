"""The wheel with each extra, in a fresh environment: its packages import, others name the extra they need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "": ["moa_ffn", "moa_startup"],
    "vision": ["moa_ffn", "moa_train", "moa_vision"],
    "lm": ["moa_ffn", "moa_train", "moa_lm"],
    "eval": ["moa_ffn", "moa_lm", "moa_eval"],
}
REFUSALS = {
    "": {"moa_train": "[vision]' or", "moa_vision": "[vision]", "moa_lm": "[lm]", "moa_eval.harness": "[eval]"},
    "vision": {"moa_lm": "[lm]", "moa_eval.page": "[eval]"},
    "lm": {"moa_vision": "[vision]", "moa_eval.harness": "[eval]"},
    "eval": {"moa_vision": "[vision]"},
}
TRAINING = ("check", "data", "documents", "encode", "pretrain", "diagnostics", "token_shards")
NOT_WITHOUT = {"eval": [f"moa_lm.{module}" for module in TRAINING]}
"""Modules of the packages that need another extra as well: training, by `moa_train`."""

IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1].split(","):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                print(module.name, error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("extra", PACKAGES)
def test_an_extra_installs_what_its_packages_import(extra, wheel, tmp_path):
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    environment, python = tmp_path / "environment", tmp_path / "environment/bin/python"
    wanted = f"mixture-of-activations{f'[{extra}]' if extra else ''} @ file://{wheel}"
    locked = ["--constraint", ROOT / "requirements.lock", "--no-verify-hashes"]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *locked, wanted], check=True)
    try:
        done = subprocess.run(
            [python, "-c", IMPORT_ALL, ",".join(PACKAGES[extra])], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        failed = [line.split()[0] for line in done.stdout.splitlines()]
        assert set(failed) <= set(NOT_WITHOUT.get(extra, [])), done.stdout
        for module, hint in REFUSALS[extra].items():
            done = subprocess.run([python, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True)
            assert f"pip install 'mixture-of-activations{hint}" in done.stderr, (module, done.stderr)
    finally:
        shutil.rmtree(environment)  # gigabytes
