"""Configurations that nobody would write: every one is a configuration or one message and exit code 2."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from moa_lm.pretrain import LMConfig
from moa_train.config import RunConfig, as_tree, parse_config
from moa_vision.pretrain import MAEConfig

ROOT = Path(__file__).parents[2]
KINDS = {"mae": MAEConfig, "lm": LMConfig}
WORDS = (
    "--",
    "--config",
    "--check=1",
    "--help=1",
    "=",
    "--optim",
    "--=1",
    "-",
    "@x",
    "--optim.",
    "--.lr=1",
    "--config=/",
)
VALUES = (
    "",
    "null",
    "nan",
    "[",
    "{",
    "}{",
    "&a [*a]",
    "!!python/object:os.system {}",
    "1" * 5000,
    "\0",
    "\ud800",
    "[" * 5000,
)


def bomb(levels):
    """Ten references to ten references to ...: 10^levels nodes, if anyone walks through them."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels + 1))]
    return "\n".join(lines) + "\n"


def outcome(fuzzing, kind, arguments):
    """Parse; return the configuration, or the message of what ended in exit code 2."""
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


@pytest.mark.parametrize("half", KINDS)
def test_files(fuzz, fuzzing, half, tmp_path):
    files = sorted((ROOT / "configs" / half).glob("*.yaml"))
    path = tmp_path / "a.yaml"

    def attempt(content):
        path.write_bytes(content)
        found = outcome(fuzzing, KINDS[half], [f"--config={path}"])
        if not isinstance(found, str):
            yaml.safe_dump(as_tree(found))  # what the run folder keeps can be written

    contents = [file.read_bytes() for file in files]
    fuzz(st.sampled_from(contents).flatmap(fuzzing.yaml_file), attempt, examples=8)


@pytest.mark.parametrize("half", KINDS)
def test_command_lines(fuzz, fuzzing, half, tmp_path):
    config = next((ROOT / "configs" / half).glob("*.yaml"))
    tree = yaml.safe_load(config.read_text())
    keys = [".".join(path) for path in fuzzing.paths(tree) if path and all(isinstance(part, str) for part in path)]
    texts = st.sampled_from(VALUES) | st.sampled_from(fuzzing.ODD).map(str) | st.text(max_size=9)
    options = st.builds("--{}={}".format, st.sampled_from(keys), texts)
    words = options | st.sampled_from(WORDS) | st.text(max_size=9)
    unfair = ("-h", "--help", "--print_config", "--check")  # these end with code 0

    def attempt(arguments):
        outcome(fuzzing, KINDS[half], [f"--config={config}", *arguments])

    lists = st.lists(words, min_size=1, max_size=3)
    fuzz(lists.filter(lambda given: not any(word.startswith(unfair) for word in given)), attempt, examples=12)


@pytest.mark.parametrize("text", ["optim: {lr: null}", "name: null", "loop: {log_every: null}", "optim: null"])
def test_null_where_there_must_be_a_value(fuzzing, text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    key = text.partition(":")[0]
    assert f"{key}" in outcome(fuzzing, RunConfig, [f"--config={tmp_path / 'a.yaml'}"])


LIMITED = """
import contextlib, io, resource, sys
from moa_train.config import RunConfig, parse_config
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for argument in sys.argv[1:]:
    err = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(err):
        parse_config(RunConfig, [argument], program="train", summary="A run.")
    print(repr(err.getvalue()))
"""


def test_attacks_on_the_parser(tmp_path):
    """A billion laughs, and depths at which PyYAML's parser in C ends the interpreter; in a process of its own."""
    bombs, deep = bomb(12), [unit * 20_000 for unit in ("- ", "[", "{a: ", "? ")]
    values = ["--loop.trackers={" + bombs.replace("\n", ", ") + "}", *(f"--loop.trackers={text}" for text in deep)]
    files = []
    for number, text in enumerate([bombs, *(text * 3 for text in deep)]):
        (tmp_path / f"{number}.yaml").write_text(text)
        files.append(f"--config={tmp_path / str(number)}.yaml")
    command = [sys.executable, "-c", LIMITED, *values, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    messages = done.stdout.splitlines()
    assert (done.returncode, len(messages)) == (0, 10), done.stderr[-2000:]
    for number, message in enumerate(messages):
        reason = "nested more than 50 levels" if number % 5 else "its aliases followed"
        culprit = f"{number - 5}.yaml" if number >= 5 else "--loop.trackers"
        assert reason in message and culprit in message and len(message) < 1000


def test_aliases_are_fine(fuzzing, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: &a {lr: 0.5, eps: 1e-6}\nloop: {val_every: &n 7, log_every: *n}\n")
    config = outcome(fuzzing, RunConfig, [f"--config={tmp_path / 'a.yaml'}"])
    assert (config.optim.lr, config.loop.val_every, config.loop.log_every) == (0.5, 7, 7)
