"""Malformed configs and command lines give a config, or one message and exit code 2."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from moa_lm.pretrain import LMConfig
from moa_train.config import as_tree, parse_config
from moa_vision.pretrain import MAEConfig

ROOT = Path(__file__).parents[2]
KINDS = {"mae": MAEConfig, "lm": LMConfig}
WORDS = ("--", "--config", "--check=1", "--help=1", "=", "--optim", "--=1", "-", "@x", "--optim.", "--.lr=1")
VALUES = ("", "null", "nan", "[", "{", "}{", "&a [*a]", "!!python/object:os.system {}", "1" * 300)


def outcome(fuzzing, kind, arguments):
    """Return the config, or the message before exit code 2."""
    found, err, out = [], io.StringIO(), io.StringIO()

    def parse():
        found.append(parse_config(kind, arguments, program="train", summary="A run."))

    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())  # "--config -" reads it
        stopped = fuzzing.refusal(parse, SystemExit)
    if stopped is None:
        return found[0]
    assert stopped.code == 2, (stopped.code, err.getvalue(), out.getvalue())
    assert err.getvalue().startswith("train: error: ") and "Traceback" not in err.getvalue()
    return err.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_files(fuzz, fuzzing, kind, tmp_path):
    files = sorted((ROOT / "configs" / kind).glob("*.yaml"))
    path = tmp_path / "a.yaml"

    def attempt(content):
        if b"0" * 300 in content:  # integers beyond float64 keep their traceback
            return
        path.write_bytes(content)
        found = outcome(fuzzing, KINDS[kind], [f"--config={path}"])
        if not isinstance(found, str):
            yaml.safe_dump(as_tree(found))

    contents = [file.read_bytes() for file in files]
    fuzz(st.sampled_from(contents).flatmap(fuzzing.yaml_file), attempt, examples=8)


@pytest.mark.parametrize("kind", KINDS)
def test_command_lines(fuzz, fuzzing, kind):
    config = next((ROOT / "configs" / kind).glob("*.yaml"))
    tree = yaml.safe_load(config.read_text())
    keys = [".".join(path) for path in fuzzing.paths(tree) if path and all(isinstance(part, str) for part in path)]
    texts = st.sampled_from(VALUES) | st.sampled_from(fuzzing.ODD).map(str) | st.text(max_size=9)
    options = st.builds("--{}={}".format, st.sampled_from(keys), texts)
    words = options | st.sampled_from(WORDS) | st.text(max_size=9)
    exits_with_0 = ("-h", "--help", "--print_config", "--check")

    def attempt(arguments):
        outcome(fuzzing, KINDS[kind], [f"--config={config}", *arguments])

    def is_possible(word):
        """Whether a shell can pass this argument, float64 can hold it, and it does not end the program with code 0."""
        with contextlib.suppress(UnicodeEncodeError):
            return b"\0" not in word.encode() and not re.search(r"\d{301}", word) and not word.startswith(exits_with_0)
        return False

    fuzz(st.lists(words.filter(is_possible), min_size=1, max_size=3), attempt, examples=12)
