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
    assert {"tables/losses.csv", "tables/mixing.csv", "figures/validation_loss.svg"} <= set(files(tmp_path / "out"))


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
    text = (tmp_path / "out" / "index.html").read_text()
    places = [text.index(f">{title}<") for title in titles[:3]]
    assert places == sorted(places)


@pytest.mark.usefixtures("no_figures")
def test_compare_evals_can_add_a_section_of_runs(make_run, write_results, tmp_path, command):
    results = [write_results(tmp_path / name, f"m/{name}") for name in "xy"]
    code, out, _ = command(
        "compare_evals.py", *results, "--runs", "Training", make_run("c", ffn="swiglu"), "--baseline", "y",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == ["x against y", "Training"]


@pytest.mark.usefixtures("no_figures")
def test_table_prints_losses_as_markdown(make_run, tmp_path, command):
    command("compare_runs.py", make_run("a"), make_run("b", encoder=MOA), "--out", tmp_path / "out")
    path = tmp_path / "out" / "tables" / "losses.csv"
    assert command("compare_runs.py", "--table", path) == (0, results_markdown(path), "")


@pytest.mark.usefixtures("no_figures")
def test_unfinished_and_diverged_runs_are_reported(make_run, tmp_path):
    """Runs that have just begun, stopped and diverged beside finished ones."""
    folders = [make_run("a"), make_run("nan", encoder=MOA, nan_from=25, keys=("images/a",), spread=0.1)]
    folders += [make_run("cut", encoder="vit_tiny_patch4_gelu", steps=20, status="stopped")]
    folders += [make_run("empty", encoder="vit_tiny_patch4_moa", status=None, keys=())]
    (folders[-1] / "metrics.jsonl").write_text("")
    assert compare_runs([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    for status in ("diverged", "stopped", "unfinished"):
        assert status in text
    with (tmp_path / "out" / "tables" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "diverged", "stopped", "unfinished"]
    assert [row["seen"] for row in rows] == ["2560", "2560", "1280", "0"]


@pytest.mark.usefixtures("no_figures")
def test_user_errors_are_one_line_with_exit_code_2(make_run, write_results, tmp_path, command):
    good, other = make_run("a"), make_run("b", changes={"data.val": "other"})
    language = make_run("lm", ffn="swiglu")
    result = write_results(tmp_path / "good", "m/good")
    shots = write_results(tmp_path / "shots", "m/shots", shots=5)
    file = tmp_path / "file"
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ("--out", tmp_path / "out")
    for script, arguments, words in (
        ("compare_runs.py", (tmp_path / "gone", *out), "gone: no such folder"),
        ("compare_runs.py", (empty, *out), "empty: neither a run folder nor a folder of run folders"),
        ("compare_runs.py", (good, other, "--strict", *out), "not comparable: data.val"),
        ("compare_runs.py", (good, good, *out), "given 2 times"),
        ("compare_runs.py", (good, language, *out), "use a --section for each kind"),
        ("compare_runs.py", (good, "--baseline", "relu", *out), "--baseline relu matches no single method"),
        ("compare_runs.py", (good, "--evals", "Title", tmp_path / "gone", *out), "gone: no such file or folder"),
        ("compare_runs.py", (good, "--out", file), str(file)),
        ("compare_runs.py", ("--table", file), "give the losses.csv of a report"),
        ("compare_evals.py", (tmp_path / "gone", *out), "gone: no such file or folder"),
        ("compare_evals.py", (result, shots, *out), "not comparable: arc_challenge: 0 shots in good, 5 in shots"),
        ("compare_evals.py", (result, result, *out), "given 2 times"),
        ("compare_evals.py", (result, "--baseline", "x", *out), "no result is called 'x'"),
        ("compare_evals.py", (result, "--out", result), str(result)),
    ):
        code, printed, err = command(script, *arguments)
        assert (code, printed) == (2, ""), arguments
        assert err.startswith(f"{script}: error: ") and words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "out"), "give what to compare, and --out DIR"),
        (("run",), "give what to compare, and --out DIR"),
        (("--section", "Title", "--out", "out"), "--section Title: give a title and at least one path"),
        (("--evals", "Title", "--out", "out"), "--evals Title: give a title and at least one path"),
    ],
    ids=["nothing", "no out", "no run", "no result"],
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
