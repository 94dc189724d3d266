"""The commands and the code of README.md and docs/: each command line is accepted by the program that it names."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from moa_ffn import activations
from moa_vision.export import export_encoder
from moa_vision.mae import create_mae

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = {"pretrain_lm.py": "configs/lm/moe_2b_qdmoa.yaml"}
ANY_CONFIG = "configs/mae/laptop_qdmoa.yaml"


class AcceptedError(Exception):
    """A parser has accepted the command line."""


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page; continued lines are joined, comments left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)  # variables of loops
            if words and words[0] not in ("for", "done"):
                yield shlex.join(word for word in words if word not in ("do", "..."))


COMMANDS = [pytest.param(command, id=command[:90]) for page in PAGES for command in dict.fromkeys(commands(page))]


@pytest.fixture
def parsers(monkeypatch):
    """Programs end by AcceptedError where their command line has been accepted."""

    def stopping(function):
        def parse(*args, **kwargs):
            function(*args, **kwargs)
            raise AcceptedError

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    for module in ("moa_vision.pretrain", "moa_lm.pretrain", "moa_vision.probe.command"):
        loaded = importlib.import_module(module)
        monkeypatch.setattr(loaded, "parse_config", stopping(loaded.parse_config))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def accept(words: list[str], monkeypatch) -> None:
    """Let the program that `words` start parse the others."""
    while "=" in words[0]:  # variables
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
        assert next(word for word in rest if "=" not in word) in targets
    elif program.startswith("scripts/cluster/"):
        assert (ROOT / program).is_file()
        accept(["python", *rest], monkeypatch)
    elif program == "accelerate":
        options = launch_command_parser().parse_known_args(rest[1:])[0]
        assert options.config_file is None or (ROOT / options.config_file).is_file()
        module = ["-m"] if options.module else []
        accept(["python", *module, options.training_script, *options.training_script_args], monkeypatch)
    elif program in ("python", "lm_eval"):
        start(rest if program == "python" else ["-m", "moa_eval", *rest], monkeypatch)
    else:
        assert program in ("pip", "git", "cd", "scancel") or (ROOT / program).is_file(), f"no rule for {program}"


def start(words: list[str], monkeypatch) -> None:
    if words[0] == "-m":
        name, rest = {"lm_eval": "moa_eval"}.get(words[1], words[1]), words[2:]
    else:
        name, rest = words[0], words[1:]
        usual = CONFIGS.get(Path(name).name, ANY_CONFIG)
        rest = [usual if word in ("FILE", "CONFIG") else word for word in rest if word != "--check"]
    for word in rest:
        assert not word.startswith("configs/") or "{" in word or (ROOT / word).is_file(), word
    monkeypatch.setattr(sys, "argv", [name, *rest])
    try:
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(name, run_name="__main__")
    except AcceptedError:
        return
    except SystemExit as end:
        assert not end.code, f"{name} ended with {end.code}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy, where another test was first
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command, parsers, monkeypatch):
    accept(shlex.split(command), monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of exporters and tracers, and of peft
@pytest.mark.parametrize("page", ["README.md", "docs/layer.md", "docs/upcycling.md", "docs/vision-transformers.md"])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, as a reader types them, beside the export of a tiny run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "ACTIVATIONS", dict(activations.ACTIVATIONS))
    small = {"img_size": 32, "encoder_args": {"depth": 1}, "decoder_dim": 16, "decoder_depth": 1}
    mae = create_mae("vit_tiny_patch16_qdmoa", **small)
    export_encoder(mae, tmp_path / "runs/laptop_qdmoa_s0/export", (0.5,) * 3, (0.5,) * 3)
    names = {"images": torch.randn(1, 3, 224, 224)}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), names)


def test_pages_of_a_subject_are_where_readme_says():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link
