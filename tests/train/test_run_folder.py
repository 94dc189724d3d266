"""Run folders that something has happened to."""

import errno
import fcntl
import json
import sys

import pytest

from moa_train.run_folder import RunFolder, again, summarize_rows
from moa_train.signals import LAUNCHED

TREE = {"name": "run", "out": "runs", "optim": {"lr": 0.1}}


def row(kind, step, **values):
    return {"kind": kind, "step": step, "epoch": 0.0, "samples": step, "wall_s": 1.0} | values


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(TREE, {"torch": "2"})
    for step in (1, 2, 3):
        folder.append(row("train", step, loss=1 / step))
        folder.append(row("val", step, loss=step, loss_norm=(step - 2) ** 2))
    return folder


def test_truncate(folder):
    with folder.metrics.open("a") as file:
        file.write('{"kind": "tra')
    folder.truncate(2, 1)
    assert [(r["kind"], r["step"]) for r in folder.rows()] == [("train", 1), ("val", 1), ("train", 2)]
    assert folder.metrics.read_text().endswith("}\n")
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []


def test_summary(folder):
    folder.summarize({"status": "finished"}, "loss_norm")
    assert folder.status() == "finished"
    assert folder.summary() == {
        "status": "finished",
        "final": {"loss": 3, "loss_norm": 1},
        "best": {"loss": 2, "loss_norm": 0, "step": 2},
        "train_loss": 1 / 3,
    }


def test_summary_of_nothing():
    assert summarize_rows([], "loss") == {"final": None, "best": None, "train_loss": None}


def test_not_a_number_becomes_null(folder):
    folder.append(row("val", 4, loss=float("nan"), loss_norm=float("inf")))
    assert json.loads(folder.metrics.read_text().splitlines()[-1])["loss"] is None
    assert summarize_rows(folder.rows(), "loss_norm")["best"]["step"] == 2


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"kind": "test", "step": 1}', '{"kind": "val", "step": null}', "null"]
)
def test_a_line_that_is_no_row_is_named(folder, line):
    text = folder.metrics.read_text()
    folder.metrics.write_text(f"{line}\n{text}")
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is no metrics row"):
        folder.check(TREE, "auto")


@pytest.mark.parametrize("text", ["[", "- 1", "", "name: run: x"])
def test_a_broken_config_is_named(folder, text):
    (folder.path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run/config.yaml cannot be read"):
        folder.check(TREE, "auto")


def test_a_file_system_without_locks_is_told_of(folder, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with folder.held():
        (warning,) = capsys.readouterr().err.splitlines()
    assert "run.lock cannot be locked ([Errno " in warning and "would not be refused" in warning


@pytest.mark.parametrize("launcher", ["", *LAUNCHED, "WORLD_SIZE"])
def test_the_command_to_run_again_is_the_one_that_was_run(launcher, monkeypatch):
    """As far as it is known: a launcher's own options are not."""
    for name in (*LAUNCHED, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(sys, "argv", ["a b.py", "--x", "1"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    if launcher:
        aside = " (by the same launcher, whose own options are not shown):"
        assert again("--y 2", "--z 3") == f"{aside}\n  'a b.py' --x 1 --y 2\n  'a b.py' --x 1 --z 3"
    else:
        assert again() == ":\n  python3 'a b.py' --x 1"
