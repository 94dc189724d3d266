"""Run folders, checkpoints and sweeps that something has damaged: each is read, or refused in one message that names
the file."""

import contextlib
import hashlib
import io
import json
import shutil

import pytest
import torch

from moa_train import checkpoint
from moa_train.checkpoint import FILES, DamagedCheckpoint
from moa_train.errors import ConfigError, DataError
from moa_train.run_folder import RunFolder, summarize_rows
from moa_train.sweep.grid import Trainer, check
from moa_train.sweep.state import SweepRun

RECORDS = ("config.yaml", "metrics.jsonl", "summary.json", "env.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_runs):
    """A finished run of the toy, three checkpoints; to be copied, not touched."""
    runs = make_runs(tmp_path_factory.mktemp("finished"))
    assert runs("run", checkpoint__keep_latest=3) == 0
    return runs.out / "run"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_records(fuzz, fuzzing, folder):
    tree = json.loads((folder / "checkpoints/step_00000015/state.json").read_text())["config"]

    def attempt(example):
        name, content = example
        records = RunFolder(folder)
        readers = {
            "check": lambda: records.check(tree, "auto"),
            "rows": records.rows,
            "summary": records.summary,
            "status": records.status,
            "summarize": lambda: summarize_rows(records.rows(), "loss_norm"),
            "truncate": lambda: records.truncate(10, 8),
        }
        with fuzzing.replaced(folder / name, content):
            for reader, read in readers.items():
                with fuzzing.replaced(folder / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()):
                    error = fuzzing.refusal(read, ValueError)
                assert error is None or str(folder) in str(error), (reader, error)

    fuzz(fuzzing.damage(folder, RECORDS), attempt, examples=30)


def test_sweep_of_a_damaged_run(fuzz, fuzzing, folder):
    tree = json.loads((folder / "checkpoints/step_00000015/state.json").read_text())["config"]
    run = SweepRun("run", folder, folder / "log", [])
    trainer = Trainer(folder, lambda arguments: print(json.dumps(tree)), frozenset())

    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: check(run, trainer), ValueError, DataError, ConfigError)
            assert error is None or str(folder) in str(error), error

    fuzz(fuzzing.damage(folder, RECORDS), attempt, examples=30)


def resealed(folder, name, content):
    """state.json with the right checksum of another content of one of its files."""
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(state).encode()


def toy_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def test_checkpoints(fuzz, fuzzing, folder):
    path = folder / "checkpoints/step_00000015"

    def attempt(example):
        name, content = example
        with fuzzing.replaced(path / name, content):
            error = fuzzing.refusal(lambda: checkpoint.verify(path), DamagedCheckpoint)
            assert error is None or f"{path}/" in str(error)
            newest, damaged = checkpoint.newest_valid(folder / "checkpoints")
            assert newest == (path if error is None else folder / "checkpoints/step_00000010")
            assert len(damaged) == (error is not None)

    fuzz(fuzzing.damage(path, ("state.json", *FILES)), attempt, examples=30)


def test_checkpoints_whose_checksums_are_right(fuzz, fuzzing, folder):
    path = folder / "checkpoints/step_00000015"

    def attempt(example):
        name, content = example
        seal = resealed(path, name, content)
        with fuzzing.replaced(path / "state.json", seal), fuzzing.replaced(path / name, content):
            checkpoint.verify(path)
            error = fuzzing.refusal(lambda: checkpoint.load(path, *toy_model()), ValueError)
            assert error is None or str(path) in str(error)

    fuzz(fuzzing.damage(path, FILES), attempt, examples=30)


def everything(fuzzing, folder):
    """A strategy for (name, content) of any file that a resumed run reads; checkpoints' checksums are made to fit."""
    last = "checkpoints/step_00000015"
    records = fuzzing.damage(folder, (*RECORDS, f"{last}/state.json", "checkpoints/LAST"))
    return records | fuzzing.damage(folder, [f"{last}/{name}" for name in FILES])


@pytest.mark.parametrize("how", ["resumed", "start_from"])
def test_whole_runs(fuzz, fuzzing, runs, folder, how, monkeypatch):
    last = folder / "checkpoints/step_00000015"

    def attempt(example):
        name, content = example
        own = shutil.copytree(folder, folder.parent / "again")
        try:
            (own / name).write_bytes(content)
            if name.endswith(".safetensors"):
                seal = resealed(own / last.relative_to(folder), name.split("/")[-1], content)
                (own / last.relative_to(folder) / "state.json").write_bytes(seal)
            options = {"checkpoint__keep_latest": 3, "schedule__epochs": 4}
            if how == "start_from":
                options |= {"schedule__decay_fraction": 0.1, "start_from": own / last.relative_to(folder)}
                shutil.rmtree(folder.parent / "new", ignore_errors=True)
            else:
                options |= {"resume": "force"}
            err, out = io.StringIO(), io.StringIO()
            codes = []
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
                fuzzing.refusal(lambda: codes.append(runs("new" if how == "start_from" else "again", **options)))
            assert codes[0] in (0, 1, 2), codes
            message = err.getvalue()
            assert "Traceback" not in message
            if codes[0]:
                assert "error: " in message and (str(own) in message or "the loss is nan" in message), message
        finally:
            shutil.rmtree(own)

    fuzz(everything(fuzzing, folder), attempt, examples=5)
