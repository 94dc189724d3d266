"""Which package imports which, and where each heavy dependency lives."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "moa_ffn": set(),
    "moa_train": {"moa_startup"},
    "moa_vision": {"moa_ffn", "moa_train", "moa_startup"},
    "moa_lm": {"moa_ffn", "moa_train", "moa_startup"},
    "moa_eval": {"moa_lm", "moa_train", "moa_startup"},
    "moa_startup": set(),
}
HOMES = {
    "timm": {"moa_vision"},
    "webdataset": {"moa_vision"},
    "torchvision": {"moa_vision"},
    "torchcodec": {"moa_vision"},
    "accelerate": {"moa_train"},
    "jsonargparse": {"moa_train"},
    "altair": {"moa_eval"},
    "vl_convert": {"moa_eval"},
    "rich": {"moa_train"},
    "jinja2": {"moa_eval"},
    "lm_eval": {"moa_eval"},
    "transformers": {"moa_lm", "moa_eval"},  # models there; their attention interface, for scoring, here
}


def imported(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        ours = {name for name in names if name.startswith("moa_")} - {package}
        assert ours <= ALLOWED[package], f"{path} imports {ours - ALLOWED[package]}"
        strangers = {name for name in names if package not in HOMES.get(name, {package})}
        assert not strangers, f"{path} imports {strangers}, whose home is elsewhere"
        assert "pickle" not in names, f"{path} imports pickle"


def test_the_layer_needs_torch_alone():
    names = set().union(*(imported(path) for path in (ROOT / "moa_ffn").rglob("*.py")))
    third_party = names - {"moa_ffn", "torch"} - set(__import__("sys").stdlib_module_names)
    assert third_party == {"triton"}  # which torch brings along on GPUs


def test_the_layer_runs_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # to import it is an error
import torch, moa_ffn
ffn = moa_ffn.FFN(8, 16)
ffn(torch.ones(3, 8)).sum().backward()
try:
    moa_ffn.FFN(8, 16, backend="triton")(torch.ones(3, 8))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "triton is not installed" in done.stdout


UNSAFE = re.compile(
    r"torch\.(load|save)\(|np\.load\(|load_state\(|\bimport pickle\b|yaml\.(load|full_load|unsafe_load)\(|shell=True"
    r"|\.extract(all)?\(|(?<![\w.])(eval|exec)\("
)
"""What runs, unpickles or unpacks what comes from outside."""

UNSAFE_LINES = {
    # facebookresearch/mae publishes pickles only; weights_only reads tensors and containers, nothing else
    "moa_vision/convert.py": ['        return torch.load(path, map_location="cpu", weights_only=True)["model"]'],
    # Text of our own making.
    "moa_ffn/backends/triton/build.py": ['    exec(compile(text, file, "exec"), namespace)'],
    "moa_vision/cache.py": [  # the command of the user's own pattern "pipe:...", as in webdataset
        '            subprocess.run(shard.url.removeprefix("pipe:"), shell=True, stdout=file, check=True)'
    ],
}


def test_nothing_unsafe_is_read():
    for folder in (*ALLOWED, "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            found = [line for line in path.read_text().splitlines() if UNSAFE.search(line)]
            assert found == UNSAFE_LINES.get(str(path.relative_to(ROOT)), []), path
