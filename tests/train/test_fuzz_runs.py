"""Damaged run folders and checkpoints are read, or refused in one message that names the file."""

import json
import shutil

import pytest

from moa_train import checkpoint
from moa_train.checkpoint import FILES, DamagedCheckpoint
from moa_train.errors import DataError
from moa_train.run_folder import RunFolder, summarize_rows

RECORDS = ("config.yaml", "metrics.jsonl", "summary.json", "env.json")
LAST = "checkpoints/step_00000015"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_runs):
    """A finished toy run with three checkpoints, to be copied."""
    runs = make_runs(tmp_path_factory.mktemp("finished"))
    assert runs("run", checkpoint__keep_latest=3) == 0
    return runs.out / "run"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_records(fuzz, fuzzing, folder):
    tree = json.loads((folder / LAST / "state.json").read_text())["config"]

    def attempt(example):
        name, content = example
        records = RunFolder(folder)
        readers = {
            "check": lambda: records.check(tree, "force", frozenset()),
            "rows": records.rows,
            "summary": records.summary,
            "status": records.status,
            "summarize": lambda: summarize_rows(records.rows(), "loss_norm"),
            "truncate": lambda: records.truncate(10, 8),
        }
        with fuzzing.replaced(folder / name, content):
            for reader, read in readers.items():
                with fuzzing.replaced(folder / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()):
                    error = fuzzing.refusal(read, DataError)
                assert error is None or str(folder) in str(error), (reader, error)

    fuzz(fuzzing.damage(folder, RECORDS), attempt, examples=30)


def test_checkpoints(fuzz, fuzzing, folder):
    path = folder / LAST

    def attempt(example):
        name, content = example
        with fuzzing.replaced(path / name, content):
            error = fuzzing.refusal(lambda: checkpoint.verify(path), DamagedCheckpoint)
            assert error is None or f"{path}/" in str(error)
            newest, damaged = checkpoint.newest_valid(folder / "checkpoints")
            assert newest == (path if error is None else folder / "checkpoints/step_00000010")
            assert len(damaged) == (error is not None)

    fuzz(fuzzing.damage(path, ("state.json", *FILES)), attempt, examples=30)
