"""Damaged run folders and results: the page is written, or a one-line message names the file."""

import contextlib
import io

import pytest

from moa_eval import cli


def damage(fuzzing, folder, weight=lambda path: 1):
    """Return a strategy for (name, content) of the files below a folder, by their weights."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() for _ in range(weight(path))]
    return fuzzing.damage(folder, [str(path.relative_to(folder)) for path in files])


def check(fuzzing, command, arguments, culprit):
    """Check that a command exits with 0, or with 2 and one line that names the culprit."""
    codes, err = [], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        fuzzing.refusal(lambda: codes.append(command(arguments)))
    assert codes[0] in (0, 2)
    if codes[0]:
        message = err.getvalue()
        named = culprit in message or "error: not comparable: " in message  # names the runs by their labels
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
            check(fuzzing, cli.compare_runs, [str(folder), str(other), "--out", out], str(folder))

    fuzz(damage(fuzzing, folder, lambda path: 1 if path.suffix == ".png" else 4), attempt, examples=5)


def test_compare_evals(fuzz, fuzzing, write_results, no_figures, tmp_path):
    base = write_results(tmp_path / "a", items=6)
    other = write_results(tmp_path / "b", model="models/other", skill=0.7, items=6)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(tmp_path / "a" / name, content):
            arguments = [str(base), str(other), "--out", str(tmp_path / "out")]
            check(fuzzing, cli.compare_evals, arguments, str(tmp_path))

    fuzz(damage(fuzzing, tmp_path / "a", lambda path: 4 if "results_" in path.name else 1), attempt, examples=5)
