"""Results that something has damaged: the page is written, or one message names the file."""

import contextlib
import io
import math

import pytest

from moa_eval import cli
from moa_eval.page.formatting import show
from moa_eval.training.comparison import NotComparableError
from moa_eval.training.reading import RunFolderError
from moa_train.errors import ConfigError, DataError


def damage(fuzzing, folder, weight=lambda path: 1):
    """A strategy for (name, content) of any file below a folder, a file as likely as its weight."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() for _ in range(weight(path))]
    return fuzzing.damage(folder, [str(path.relative_to(folder)) for path in files])


def told(fuzzing, command, arguments, culprit):
    """Call a command; it ends with 0, or with 2 and one line that names what is wrong."""
    codes, err = [], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        fuzzing.refusal(lambda: codes.append(command(arguments)))
    assert codes[0] in (0, 2)
    if codes[0]:
        message = err.getvalue()
        named = culprit in message or "error: not comparable: " in message  # which names the runs by their labels
        assert "error: " in message and message.count("\n") == 1 and named, message


@pytest.mark.parametrize("kind", ["autoencoders", "language models"])
def test_compare_runs(fuzz, fuzzing, make_run, no_figures, tmp_path, kind):
    if kind == "autoencoders":
        folder = make_run("a", spread=0.1, probes={"knn": 0.4})
        other = make_run("b", encoder="vit_tiny_patch4_qdmoa", spread=0.2, probes={"knn": 0.5}, seed=1)
    else:
        folder = make_run("a", ffn="swiglu", experts=[[0.25, 0.25, 0.5], [0.05, 0.9, 0.05]], spread=0.1)
        other = make_run("b", ffn="qdmoa", experts=[[0.25, 0.25, 0.5], [0.05, 0.9, 0.05]], seed=1)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            out = str(tmp_path / "out")
            told(fuzzing, cli.compare_runs, [str(folder), str(other), "--out", out], str(folder))

    # Pictures are many; a page is more often wrong about numbers.
    fuzz(damage(fuzzing, folder, lambda path: 1 if path.suffix == ".png" else 4), attempt, examples=5)


def test_compare_evals(fuzz, fuzzing, write_results, no_figures, tmp_path):
    base = write_results(tmp_path / "a", items=6)
    other = write_results(tmp_path / "b", model="models/other", skill=0.7, items=6)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(tmp_path / "a" / name, content):
            arguments = [str(base), str(other), "--out", str(tmp_path / "out")]
            told(fuzzing, cli.compare_evals, arguments, str(tmp_path))

    fuzz(damage(fuzzing, tmp_path / "a", lambda path: 4 if "results_" in path.name else 1), attempt, examples=5)


def test_tables(fuzz, fuzzing, make_run, no_figures, tmp_path):
    out = tmp_path / "out"
    arguments = [str(make_run("a")), str(make_run("b", encoder="vit_tiny_patch4_qdmoa")), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.compare_runs(arguments) == 0
    table = out / "tables/losses.csv"

    def attempt(content):
        with fuzzing.replaced(table, content):
            told(fuzzing, cli.compare_runs, ["--table", str(table)], str(table))

    fuzz(fuzzing.damaged(table.read_bytes()), attempt, examples=20)


def test_lists_of_an_earlier_page(fuzz, fuzzing, make_run, no_figures, tmp_path):
    out = tmp_path / "out"
    arguments = [str(make_run("a")), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.compare_runs(arguments) == 0

    def attempt(example):
        with fuzzing.replaced(out / example[0], example[1]), contextlib.redirect_stdout(io.StringIO()):
            assert cli.compare_runs(arguments) == 0
            assert (out / "index.html").is_file()

    fuzz(fuzzing.damage(out, ["files.json"]), attempt, examples=4)


def test_errors_are_those_that_commands_say():
    assert set(cli.READABLE) == {ConfigError, DataError, RunFolderError, NotComparableError, OSError}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_that_are_no_finite_number_are_shown(value):
    assert show(value) == str(value)
