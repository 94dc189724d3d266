"""A stopped and resumed run equals an unbroken one, bit for bit; what may change between sessions, and what may not."""

import shutil

import pytest

from moa_train.signals import EXIT_STOPPED


@pytest.fixture
def unbroken(runs):
    assert runs("unbroken") == 0
    assert [row["step"] for row in runs.rows("unbroken", "train")] == list(range(1, 16))
    assert [row["step"] for row in runs.rows("unbroken", "val")] == [4, 8, 12, 15]
    return "unbroken"


@pytest.mark.parametrize("stop_at", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 9, 14))])
def test_resume_is_bit_exact(runs, unbroken, stop_at, capsys):
    # 3: a validation is due; 9: an epoch ends and a checkpoint is due; 14: the last step
    assert runs("run", model__stop_at=stop_at) == EXIT_STOPPED
    assert "the same command continues" in capsys.readouterr().out
    summary = runs.json("run", "summary.json")
    assert (summary["status"], summary["steps"]) == ("stopped", stop_at + 1)
    assert not (runs.out / "run" / "export").exists()
    assert runs("run") == 0
    runs.assert_same("run", unbroken)
    one, other = ((runs.out / name / "export/weights.txt").read_text() for name in ("run", unbroken))
    assert one == other


def test_repeated_validation_is_written_once(runs, unbroken):
    assert runs("run", model__stop_in_val=4) == EXIT_STOPPED
    assert runs("run", model__stop_at=4, checkpoint__keep_latest=9) == EXIT_STOPPED  # after the validation
    newest = runs.out / "run/checkpoints/step_00000005"
    (newest / "model.safetensors").write_bytes(b"")  # the next session starts at step 4 again
    assert runs("run") == 0
    runs.assert_same("run", unbroken)


def test_damaged_checkpoint_is_skipped(runs, unbroken, capsys):
    assert runs("run", model__stop_at=11) == EXIT_STOPPED
    weights = runs.out / "run/checkpoints/step_00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert runs("run") == 0
    assert "step_00000012/model.safetensors is damaged" in capsys.readouterr().out
    runs.assert_same("run", unbroken)


def test_finished_run_is_left_alone(runs, unbroken, capsys):
    metrics = runs.out / unbroken / "metrics.jsonl"
    before = metrics.read_text()
    shutil.rmtree(runs.out / unbroken / "checkpoints")  # also without them
    assert runs(unbroken) == 0
    assert "finished    15 steps" in capsys.readouterr().out and metrics.read_text() == before
    assert runs(unbroken, schedule__epochs=4, resume="force") == 0
    assert runs.json(unbroken, "summary.json")["steps"] == 20


def damage(folder):
    for path in folder.glob("step_*/generators.safetensors"):
        path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"), [(shutil.rmtree, "holds 12 steps"), (damage, "generators.safetensors is damaged")]
)
def test_run_without_usable_checkpoints_is_not_restarted(runs, unbroken, fault, message, capsys):
    assert runs("run", model__stop_at=11) == EXIT_STOPPED
    folder = runs.out / "run"
    fault(folder / "checkpoints")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert runs("run") == 2
    error = capsys.readouterr().err
    assert message in error and "no usable checkpoint" in error and "--resume force" in error
    assert all(path.read_bytes() == content for path, content in files.items())
    assert runs("run", resume="force") == 0
    runs.assert_same("run", unbroken)


def test_missing_config_needs_force(runs, unbroken, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    (runs.out / "run" / "config.yaml").unlink()
    assert runs("run") == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert runs("run", resume="force") == 0
    assert runs.final("run") == runs.final(unbroken)


def test_other_config_is_refused_and_forced(runs, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    rows = runs.rows("run")
    assert runs("run", optim__lr=0.002, seed=3) == 2
    error = capsys.readouterr().err
    assert "optim.lr: 0.01 -> 0.002; seed: 0 -> 3" in error and error.count("\n") == 1
    assert runs.rows("run") == rows
    assert runs("run", optim__lr=0.002, resume="force") == 0
    assert "continuing with another value of optim.lr: 0.01 -> 0.002" in capsys.readouterr().out
    rates = [row["lr"] for row in runs.rows("run", "train")]
    assert max(rates[:7]) == 0.01 and max(rates[7:]) < 0.002


def test_mutable_keys_may_change(runs, unbroken):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    changed = {"checkpoint__interval": 3, "checkpoint__keep_latest": 1, "loop__log_every": 2}
    assert runs("run", **changed) == 0
    assert runs.final("run") == runs.final(unbroken)
    assert [row["step"] for row in runs.rows("run", "train")] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule__epochs": 1}, "step_00000007 is past the end of this config, step 5"),
        ({"model__width": 9}, "belongs to another model"),
        ({"schedule__batch_size": 4}, None),
    ],
)
def test_force_has_limits(runs, changed, message, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    assert runs("run", **changed, resume="force") == (2 if message else 0)
    captured = capsys.readouterr()
    assert message in captured.err if message else "schedule.batch_size was 8 and is 4 now" in captured.out


def test_other_data_need_force(runs, monkeypatch, capsys):
    monkeypatch.setattr(runs.toy.ToyTask, "identity", lambda task: {"train": "a", "val": "b"})
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    monkeypatch.setattr(runs.toy.ToyTask, "identity", lambda task: {"train": "c", "val": "b"})
    assert runs("run") == 2
    assert "was trained on other data: train changed since" in capsys.readouterr().err
    assert runs("run", resume="force") == 0


def test_resume_never_refuses_an_existing_run(runs, capsys):
    assert runs("run", resume="never") == 0
    assert runs("run", resume="never") == 2
    assert "already holds a run" in capsys.readouterr().err
