import csv
import re
import runpy
import sys
from pathlib import Path

import pytest

from moa_eval.cli import compare_runs
from moa_eval.training.readme import results_markdown

SCRIPTS = Path(__file__).parents[2] / "scripts"
MOA = "vit_tiny_patch4_qdmoa"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script; return its exit code, stdout and stderr."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return (caught.value.code, *capsys.readouterr())

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_compare_runs_prints_the_verdict_and_the_path_of_the_page(make_run, tmp_path, command):
    folders = [make_run("a"), make_run("b", encoder=MOA, spread=0.1)]
    code, out, err = command("compare_runs.py", *folders, "--out", tmp_path / "out", "--title", "Mine & yours")
    *verdict, page = out.splitlines()
    assert (code, page, err) == (0, str(tmp_path / "out" / "index.html"), "")
    assert "".join(verdict) in (tmp_path / "out" / "summary.md").read_text().replace("**", "")
    assert "<h1>Mine &amp; yours</h1>" in (tmp_path / "out" / "index.html").read_text()
    assert {"tables/losses.csv", "tables/mixing.csv", "figures/validation_loss.png"} <= set(files(tmp_path / "out"))


@pytest.mark.usefixtures("no_figures")
def test_output_is_reproducible(make_run, tmp_path, command):
    folders = [make_run("a", probes={"knn": 0.5}), make_run("b", encoder=MOA, spread=0.1)]
    command("compare_runs.py", *folders, "--out", tmp_path / "out", "--title", "Mine")
    command("compare_runs.py", "--out", tmp_path / "again", "--title", "Mine", *folders)
    written = files(tmp_path / "out")
    assert written == files(tmp_path / "again")
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.usefixtures("no_figures")
def test_sections_of_runs_and_results_share_one_page_in_order(make_run, write_results, tmp_path, command):
    runs = [make_run("a"), make_run("b", encoder=MOA)]
    language = [make_run("c", ffn="swiglu"), make_run("d", ffn="qdmoa")]
    results = [write_results(tmp_path / name, f"m/{name}") for name in "xy"]
    code, out, err = command(
        "compare_runs.py", *runs, "--section", "Language models", *language, "--evals", "Zero shot", *results,
        "--section", "Language models", language[0], "--baseline", "SwiGLU", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    titles = ["qd-MoA against SwiGLU", "Language models", "Zero shot", "Language models"]
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == titles
    tables = {path.parts[1] for path in map(Path, files(tmp_path / "out")) if path.parts[0] == "tables"}
    assert tables == {"training", "language-models", "language-models-2", "zero-shot"}


@pytest.mark.usefixtures("no_figures")
def test_table_prints_losses_as_markdown(make_run, tmp_path, command):
    command("compare_runs.py", make_run("a"), make_run("b", encoder=MOA), "--out", tmp_path / "out")
    path = tmp_path / "out" / "tables" / "losses.csv"
    assert command("compare_runs.py", "--table", path) == (0, results_markdown(path), "")


@pytest.mark.usefixtures("no_figures")
def test_unfinished_and_diverged_runs_are_reported(make_run, tmp_path):
    folders = [make_run("a"), make_run("nan", encoder=MOA, nan_from=25, keys=("images/a",), spread=0.1)]
    folders += [make_run("cut", encoder="vit_tiny_patch4_gelu", steps=20, status="stopped")]
    folders += [make_run("empty", encoder="vit_tiny_patch4_moa", status=None, keys=())]
    (folders[-1] / "metrics.jsonl").write_text("")
    assert compare_runs([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert {"diverged", "stopped", "unfinished"} <= set(re.findall(r"\w+", (tmp_path / "out/index.html").read_text()))
    with (tmp_path / "out/tables/runs.csv").open(newline="") as file:
        found = [(row["status"], row["seen"]) for row in csv.DictReader(file)]
    assert found == [("finished", "2560"), ("diverged", "2560"), ("stopped", "1280"), ("unfinished", "0")]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("compare_runs.py", ["empty"], "empty: neither a run folder nor a folder of run folders"),
        ("compare_runs.py", ["runs/a", "runs/b", "--strict"], "not comparable: data.val"),
        ("compare_runs.py", ["runs/a", "--baseline", "relu"], "--baseline relu matches no single method"),
        ("compare_runs.py", ["runs/a", "--evals", "Title", "gone"], "gone: "),
        ("compare_runs.py", ["runs/a", "--out", "file"], "file"),
        ("compare_runs.py", ["--table", "file"], "give the losses.csv of a report"),
        ("compare_evals.py", ["gone"], "gone: "),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(make_run, tmp_path, monkeypatch, command, script, arguments, words):
    make_run("a")
    make_run("b", changes={"data.val": "other"})
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, printed, err = command(script, *arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert (code, printed) == (2, "") and not (tmp_path / "out").exists()
    assert err.startswith(f"{script}: error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "out"], "give what to compare, and --out DIR"),
        (["run"], "give what to compare, and --out DIR"),
        (["--section", "Title", "--out", "out"], "--section Title: give a title and at least one path"),
    ],
)
def test_missing_arguments_are_usage_errors(command, arguments, words):
    code, _, err = command("compare_runs.py", *arguments)
    assert code == 2 and words in err


def test_tables_in_the_documentation_are_those_of_the_studies():
    """Each table below a comment "results of FILE" is what `--table FILE` prints."""
    root = SCRIPTS.parent
    text = "".join(page.read_text() for page in (root / "README.md", *sorted(root.glob("docs/**/*.md"))))
    found = re.findall(r"<!-- results of (\S+) -->\n((?:\|.*\n)+)", text)
    assert found and text.count("<!-- results of") == len(found)
    for path, table in found:
        assert table == results_markdown(SCRIPTS.parent / path)
