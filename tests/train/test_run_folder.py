"""Run folders: rows, summary and damaged files."""

import errno
import fcntl
import json
import subprocess
import sys

import pytest

from moa_train.errors import DataError
from moa_train.run_folder import RunFolder, summarize_rows

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
    folder.events.write_text('{"kind": "begun"}\n{"ki')
    folder.truncate(2, 1)
    assert folder.events.read_text() == '{"kind": "begun"}\n'
    assert [(r["kind"], r["step"]) for r in folder.rows()] == [("train", 1), ("val", 1), ("train", 2)]
    assert folder.metrics.read_text().endswith("}\n")


def test_summary(folder):
    assert folder.status() == "unfinished" and folder.finished_steps() is None
    folder.summarize({"status": "finished", "steps": 3}, "loss_norm")
    assert folder.status() == "finished" and folder.finished_steps() == 3
    losses = {
        "final": {"loss": 3, "loss_norm": 1},
        "best": {"loss": 2, "loss_norm": 0, "step": 2},
        "train_loss": 1 / 3,
    }
    assert folder.summary() == {"status": "finished", "steps": 3, **losses}
    assert summarize_rows([], "loss") == dict.fromkeys(losses)


def test_nan_becomes_null(folder):
    folder.append(row("val", 4, loss=float("nan"), loss_norm=float("inf")))
    assert json.loads(folder.metrics.read_text().splitlines()[-1])["loss"] is None
    assert summarize_rows(folder.rows(), "loss_norm")["best"]["step"] == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "test", "step": 1}', '{"kind": "val", "step": null}'])
def test_damaged_row_is_named(folder, line):
    folder.metrics.write_text(f"{line}\n{folder.metrics.read_text()}")
    with pytest.raises(DataError, match=r"metrics.jsonl line 1 is no metrics row"):
        folder.check(TREE, "auto", frozenset())


def test_file_system_without_locks_is_a_warning(folder, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with folder.lock():
        (warning,) = capsys.readouterr().err.splitlines()
    assert "run.lock cannot be locked ([Errno " in warning


def test_reading_a_run_needs_neither_torch_nor_jsonargparse():
    script = (
        "import moa_train.run_folder, sys; print(sorted({'torch', 'jsonargparse', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
