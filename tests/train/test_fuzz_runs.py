"""Run folders, checkpoints and sweeps that something has damaged: each is read, or refused in one message that names
the file."""

import contextlib
import hashlib
import io
import json
import shutil

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from moa_train import checkpoint
from moa_train.checkpoint import FILES, DamagedCheckpoint
from moa_train.records import RunFolder, summarize_rows
from moa_train.sweep.check import check
from moa_train.sweep.grid import PlannedRun, name_configs
from moa_train.sweep.slurm import Cluster, SlurmError
from moa_train.sweep.state import Job, observe, time_left_s

TYPES = (torch.float64, torch.int64, torch.bfloat16, torch.bool, torch.uint8)
RECORDS = ("config.yaml", "metrics.jsonl", "summary.json", "env.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_runs):
    """A finished run of the toy, three checkpoints; to be copied, not touched."""
    runs = make_runs(tmp_path_factory.mktemp("finished"))
    assert runs("run", loop__keep=3) == 0
    return runs.out / "run"


def file_like(fuzzing, path):
    """A strategy for the file gone wrong, by its ending."""
    kinds = {".yaml": fuzzing.yaml_file, ".jsonl": fuzzing.lines_file, ".json": fuzzing.json_file}
    return kinds.get(path.suffix, fuzzing.damaged)(path.read_bytes())


def damage(fuzzing, folder, names):
    """A strategy for (name, content)."""
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), file_like(fuzzing, folder / name)))


@contextlib.contextmanager
def replaced(path, content):
    """A file with another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


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
            "observe": lambda: [observe(folder).left_s, observe(folder).duration_s],
        }
        with replaced(folder / name, content):
            for reader, read in readers.items():
                with replaced(folder / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes()):
                    error = fuzzing.refusal(read, ValueError)
                assert error is None or str(folder) in str(error), (reader, error)

    fuzz(damage(fuzzing, folder, RECORDS), attempt, examples=30)


def test_a_sweep_of_damaged_runs(fuzz, fuzzing, folder):
    run = PlannedRun("run", folder / "config.yaml", {}, 0, folder.parent)
    tree = json.loads((folder / "checkpoints/step_00000015/state.json").read_text())["config"]
    resolved = json.dumps(tree)

    def attempt(example):
        name, content = example
        with replaced(folder / name, content):
            job = []
            error = fuzzing.refusal(
                lambda: job.extend(check([run], lambda arguments: print(resolved), frozenset())), ValueError
            )
            assert error is None or str(folder) in str(error), error
            if job:
                time_left_s(job, 1)
            error = fuzzing.refusal(lambda: name_configs([folder / "config.yaml"]), ValueError)
            assert error is None or str(folder) in str(error), error

    fuzz(damage(fuzzing, folder, RECORDS), attempt, examples=30)


def test_a_cluster_whose_list_of_jobs_is_damaged(fuzz, fuzzing, tmp_path, monkeypatch):
    good = json.dumps({"12": ["a", "b"], "13": ["c"]}).encode()
    monkeypatch.setattr("moa_train.sweep.slurm._call", lambda command: "12 0 RUNNING\n12 1 PENDING\n13 0 PENDING\n")
    cluster = Cluster(tmp_path, "", "")

    def attempt(content):
        (tmp_path / "slurm.json").write_bytes(content)
        jobs = [Job(PlannedRun(name, tmp_path / "c.yaml", {}, 0, tmp_path)) for name in "abc"]
        for act in (lambda: cluster.look(jobs), lambda: cluster.submit(jobs)):
            (tmp_path / "slurm.json").write_bytes(content)
            error = fuzzing.refusal(act, SlurmError)
            assert error is None or "slurm.json" in str(error)

    fuzz(fuzzing.json_file(good), attempt, examples=30)


@st.composite
def tensors_file(draw, fuzzing, content):
    """A safetensors file gone wrong: in its header (names, types, shapes, places), in its bytes, or in its values."""
    how = draw(st.sampled_from(("header", "header", "bytes", "length", "values")))
    size = int.from_bytes(content[:8], "little")
    if how == "bytes":
        return draw(fuzzing.damaged(content))
    if how == "length":
        other = draw(st.sampled_from((0, 1, size - 1, size + 1, 100_000_001, 2**31, 2**63, 2**64 - 1)))
        return other.to_bytes(8, "little") + content[8:]
    if how == "values":
        return draw(other_tensors(content))
    header = fuzzing.as_json(draw(fuzzing.mutated(json.loads(content[8 : 8 + size]))))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def other_tensors(draw, content):
    """A whole safetensors file with some tensors of other types, shapes, names or values."""
    tensors = load(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        changes = {
            "type": lambda t: t.to(draw(st.sampled_from(TYPES))),
            "shape": lambda t: t[None],
            "flat": lambda t: t.flatten(),
            "empty": lambda t: t.flatten()[:0],
            "short": lambda t: t.flatten()[:-1],
            "nan": lambda t: torch.full_like(t.float(), float("nan")),
            "zero": torch.zeros_like,
            "scalar": lambda t: torch.tensor(3.0),
        }
        how = draw(st.sampled_from((*changes, "name", "take out")))
        if how != "take out" or not tensors:
            other = draw(st.sampled_from((*sorted(tensors), "x", "", ".", "0.cpu", "0.weight", "3.bias.step")))
            tensors[other if how == "name" else name] = changes.get(how, lambda t: t)(tensor).contiguous()
    return save({name: tensor.clone() for name, tensor in tensors.items()})


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
        with replaced(path / name, content):
            error = fuzzing.refusal(lambda: checkpoint.verify(path), DamagedCheckpoint)
            assert error is None or f"{path}/" in str(error)
            newest, damaged = checkpoint.newest_valid(folder / "checkpoints")
            assert newest == (path if error is None else folder / "checkpoints/step_00000010")
            assert len(damaged) == (error is not None)

    fuzz(damage(fuzzing, path, ("state.json", *FILES)), attempt, examples=30)


def test_checkpoints_whose_checksums_are_right(fuzz, fuzzing, folder):
    path = folder / "checkpoints/step_00000015"
    examples = st.sampled_from(FILES).flatmap(
        lambda name: st.tuples(st.just(name), tensors_file(fuzzing, (path / name).read_bytes()))
    )

    def attempt(example):
        name, content = example
        with replaced(path / "state.json", resealed(path, name, content)), replaced(path / name, content):
            checkpoint.verify(path)
            error = fuzzing.refusal(lambda: checkpoint.load(path, *toy_model()), ValueError)
            assert error is None or str(path) in str(error)

    fuzz(examples, attempt, examples=30)


def everything(fuzzing, folder):
    """A strategy for (name, content) of any file that a resumed run reads; checkpoints' checksums are made to fit."""
    last = "checkpoints/step_00000015"
    tensors = st.sampled_from(FILES).flatmap(
        lambda name: st.tuples(st.just(f"{last}/{name}"), tensors_file(fuzzing, (folder / last / name).read_bytes()))
    )
    return damage(fuzzing, folder, (*RECORDS, f"{last}/state.json", "checkpoints/LAST")) | tensors


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
            options = {"loop__keep": 3, "schedule__epochs": 4}
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
