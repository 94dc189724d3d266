"""k steps + stop + resume + the rest == one unbroken run, bit for bit, whatever the stop."""

import time

import pytest

from moa_train.signals import EXIT_STOPPED


@pytest.fixture
def unbroken(runs):
    assert runs("unbroken") == 0
    assert [row["step"] for row in runs.rows("unbroken", "train")] == list(range(1, 16))
    assert [row["step"] for row in runs.rows("unbroken", "val")] == [4, 8, 12, 15]
    return "unbroken"


@pytest.mark.parametrize("stop_at", [0, 3, 4, 6, 9, 14], ids=lambda s: f"in step {s + 1}")
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
    assert runs("run", model__stop_at=4, loop__keep=9) == EXIT_STOPPED  # validates step 4, then stops after 5
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
    assert runs("run", loop__save_every=3, loop__keep=1, loop__log_every=2) == 0
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
