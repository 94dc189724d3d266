"""k steps + stop + resume + the rest == one unbroken run, bit for bit, whatever the stop."""

import contextlib
import shutil
import threading
import time

import pytest

from moa_train import checkpoint
from moa_train.run_folder import RunFolder
from moa_train.signals import EXIT_STOPPED


@pytest.fixture
def unbroken(runs):
    assert runs("unbroken") == 0
    assert [row["step"] for row in runs.rows("unbroken", "train")] == list(range(1, 16))
    assert [row["step"] for row in runs.rows("unbroken", "val")] == [4, 8, 12, 15]
    return "unbroken"


@pytest.mark.parametrize(
    "stop_at",
    [3, 14, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4, 6, 9))],
    ids=lambda step: f"in step {step + 1}",
)
def test_stopped_once(runs, unbroken, stop_at, capsys):
    # 3: a validation is due; 4, 9: an epoch ends and a checkpoint is due; 14: the last step
    assert runs("run", model__stop_at=stop_at) == EXIT_STOPPED
    assert "The same command continues" in capsys.readouterr().out
    assert runs.json("run", "summary.json")["status"] == "stopped"
    assert runs.json("run", "summary.json")["steps"] == stop_at + 1
    assert not (runs.out / "run" / "export").exists()
    assert runs("run") == 0
    runs.assert_same("run", unbroken)
    assert (runs.out / "run" / "export" / "weights.txt").read_text() == (
        runs.out / unbroken / "export" / "weights.txt"
    ).read_text()


@pytest.mark.slow
def test_stopped_three_times_and_in_validation(runs, unbroken):
    assert runs("run", model__stop_at=2) == EXIT_STOPPED
    assert runs("run", model__stop_in_val=4) == EXIT_STOPPED
    assert [row["step"] for row in runs.rows("run", "val")] == []
    assert runs("run", model__stop_at=8) == EXIT_STOPPED
    assert runs("run", model__stop_in_val=15) == EXIT_STOPPED
    assert runs.json("run", "summary.json")["steps"] == 15
    assert runs("run") == 0
    runs.assert_same("run", unbroken)


def test_a_validation_made_up_for_is_not_written_twice(runs, unbroken):
    assert runs("run", model__stop_in_val=4) == EXIT_STOPPED
    folder = runs.out / "run"
    at_4 = (folder / "checkpoints" / "LAST").read_text()
    assert (
        runs("run", model__stop_at=4, checkpoint__keep_latest=9) == EXIT_STOPPED
    )  # validates step 4, then stops after 5
    assert at_4 == "step_00000004\n"
    newest = folder / "checkpoints" / "step_00000005"
    (newest / "model.safetensors").write_bytes(b"")  # so that the next session starts at 4 again
    assert runs("run") == 0
    runs.assert_same("run", unbroken)


def test_damaged_checkpoint_is_named_and_passed_over(runs, unbroken, capsys):
    assert runs("run", model__stop_at=11) == EXIT_STOPPED
    folder = runs.out / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["LAST", "step_00000010", "step_00000012"]
    weights = folder / "step_00000012" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert runs("run") == 0
    assert "step_00000012/model.safetensors is damaged" in capsys.readouterr().out
    runs.assert_same("run", unbroken)


@pytest.mark.slow
def test_wall_clock_adds_up(runs):
    runs("run", model__stop_at=6, model__step_s=0.02)
    first = runs.json("run", "summary.json")["wall_s"]
    assert 7 * 2 * 0.02 < first < 5
    runs("run", model__step_s=0.02)
    assert runs.json("run", "summary.json")["wall_s"] > first + 8 * 2 * 0.02


def test_finished_run_says_so(runs, unbroken, capsys):
    before = runs.final(unbroken), (runs.out / unbroken / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert runs(unbroken) == 0
    assert "finished" in capsys.readouterr().out
    assert before == (runs.final(unbroken), (runs.out / unbroken / "metrics.jsonl").read_text())


def test_finished_run_says_so_without_its_checkpoints(runs, unbroken, capsys):
    before = (runs.out / unbroken / "metrics.jsonl").read_text()
    shutil.rmtree(runs.out / unbroken / "checkpoints")
    capsys.readouterr()
    assert runs(unbroken) == 0
    assert "finished    15 steps" in capsys.readouterr().out
    assert before == (runs.out / unbroken / "metrics.jsonl").read_text()
    assert runs(unbroken, schedule__epochs=4, resume="force") == 0, "begun again, as was asked for"
    assert runs.json(unbroken, "summary.json")["steps"] == 20


def lose(folder):
    shutil.rmtree(folder)


def damage(folder):
    for path in folder.glob("step_*/generators.safetensors"):
        path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "told"), [(lose, "holds 7 steps"), (damage, "generators.safetensors is damaged")])
def test_a_run_that_has_lost_its_checkpoints_is_not_begun_again(runs, unbroken, fault, told, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    folder = runs.out / "run"
    fault(folder / "checkpoints")
    there = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert runs("run") == 2
    error = capsys.readouterr().err
    assert told in error and "no checkpoint that can be used" in error and "--resume force" in error
    assert all(path.read_bytes() == content for path, content in there.items())
    assert runs("run", resume="force") == 0
    runs.assert_same("run", unbroken)


def test_a_lost_configuration_is_forced_past(runs, unbroken, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    (runs.out / "run" / "config.yaml").unlink()
    assert runs("run") == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert runs("run", resume="force") == 0
    assert "config.yaml cannot be read" in capsys.readouterr().out
    assert runs.final("run") == runs.final(unbroken)


def test_another_batch_size_is_told_of(runs, capsys):
    assert runs("run", model__stop_at=6) == EXIT_STOPPED
    assert runs("run", schedule__batch_size=4, resume="force") == 0
    assert "its steps took 8 samples each, these take 4" in capsys.readouterr().out


def test_the_folder_is_looked_at_again_once_it_is_held(runs, monkeypatch, capsys):
    """Whoever held it until then may have begun another run in it."""
    assert runs("other", model__stop_at=6) == EXIT_STOPPED
    held = RunFolder.held

    def begun_meanwhile(folder):
        (runs.out / "other").rename(runs.out / "run.begun")
        shutil.copytree(runs.out / "run.begun", folder.path, dirs_exist_ok=True)
        return held(folder)

    monkeypatch.setattr(RunFolder, "held", begun_meanwhile)
    assert runs("run", optim__lr=0.5) == 2
    assert "optim.lr: 0.01 -> 0.5" in capsys.readouterr().err


def test_nobody_has_the_folder_while_a_checkpoint_is_being_written(runs, monkeypatch):
    """A step fails while the checkpoint of the one before is written; the lock goes once that is there."""
    save, loss, held = checkpoint.save, runs.toy.ToyTask.loss, RunFolder.held
    failed, freed = threading.Event(), []

    def late(*args, **kwargs):
        failed.wait(60)
        return save(*args, **kwargs)

    def failing(task, model, batch):
        if batch[0] == 5:
            threading.Timer(0.2, failed.set).start()
            raise ZeroDivisionError("a bug")
        return loss(task, model, batch)

    @contextlib.contextmanager
    def watched(folder):
        with held(folder):
            try:
                yield
            finally:
                freed.extend(path.name for path in folder.checkpoints.glob("step_*"))

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(runs.toy.ToyTask, "loss", failing)
    monkeypatch.setattr(RunFolder, "held", watched)
    with pytest.raises(ZeroDivisionError):
        runs("run", checkpoint__interval=10)
    assert freed == ["step_00000005"]
    assert runs.json("run", "summary.json")["status"] == "failed"


def test_another_configuration_is_refused(runs, capsys):
    runs("run", model__stop_at=6)
    rows = runs.rows("run")
    capsys.readouterr()
    assert runs("run", optim__lr=0.02, model__width=9) == 2
    error = capsys.readouterr().err
    assert "optim.lr: 0.01 -> 0.02" in error and "model.width: 8 -> 9" in error and "Traceback" not in error
    assert runs.rows("run") == rows


def test_harmless_keys_may_change(runs, unbroken):
    runs("run", model__stop_at=6)
    assert runs("run", checkpoint__interval=3, checkpoint__keep_latest=1, loop__log_every=2) == 0
    assert runs.final("run") == runs.final(unbroken)
    assert len(list((runs.out / "run" / "checkpoints").glob("step_*"))) == 1
    assert [row["step"] for row in runs.rows("run", "train")] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15]


def test_force_continues_with_other_values(runs, capsys):
    runs("run", model__stop_at=6)
    assert runs("run", optim__lr=0.002, resume="force") == 0
    assert "optim.lr: 0.01 -> 0.002" in capsys.readouterr().out
    rates = [row["lr"] for row in runs.rows("run", "train")]
    assert max(rates[:7]) == 0.01 and max(rates[7:]) < 0.002


def test_force_cannot_shorten_a_run_below_what_it_has_done(runs, capsys):
    runs("run", model__stop_at=11)
    assert runs("run", schedule__epochs=2, resume="force") == 2
    assert "step_00000012 is past the end of this configuration, step 10" in capsys.readouterr().err


def test_force_cannot_load_another_model(runs, capsys):
    runs("run", model__stop_at=6)
    assert runs("run", model__width=9, resume="force") == 2
    assert "belongs to another model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_run_by_one_process_at_a_time(runs, ranks, capsys):
    (process,) = ranks.start(count=1, model__step_s=0.5)
    try:
        while not (runs.out / "run" / "events.jsonl").exists():
            assert process.is_alive()
            time.sleep(0.01)
        assert runs("run") == 2
        assert "is being run by another process" in capsys.readouterr().err
    finally:
        process.kill()
        process.join()
    assert runs("run") == 0, "the lock has ended with its process"


def test_never_refuses_a_folder_in_use(runs, capsys):
    assert runs("run", resume="never") == 0
    assert runs("run", resume="never") == 2
    assert "already holds a run" in capsys.readouterr().err
