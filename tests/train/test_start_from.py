"""start_from: a run decayed from another run's stable checkpoint equals the run that decays there."""

import shutil

import pytest

WSD = {"schedule__decay_fraction": 0.4, "schedule__decay_type": "1-sqrt", "checkpoint__interval": 2}
"""Of 10 steps the last 4 decay, of 20 the last 8."""


@pytest.fixture
def long(runs):
    assert runs("long", schedule__epochs=4, checkpoint__keep_latest=1, checkpoint__keep_interval=2, **WSD) == 0
    return runs.out / "long" / "checkpoints"


def kept(checkpoints):
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


def test_checkpoints_of_the_keep_interval_stay(runs, long):
    assert kept(long) == [*range(2, 21, 2)]
    assert runs("few", checkpoint__keep_latest=1, checkpoint__keep_interval=10) == 0
    assert kept(runs.out / "few" / "checkpoints") == [10, 15]


@pytest.mark.slow
def test_late_decay_equals_a_run_that_decays_there(runs, long):
    assert runs("short", schedule__epochs=2, **WSD) == 0
    begin = {"schedule__epochs": 2, "start_from": long / "step_00000006", **WSD}
    assert runs("late", **begin) == 0
    rows = {name: [row for row in runs.rows(name) if row["step"] > 6] for name in ("short", "late")}
    assert rows["late"] == rows["short"] and [row["step"] for row in runs.rows("late", "train")] == [7, 8, 9, 10]
    assert runs.final("late") == runs.final("short")
    assert runs("cut", **begin, model__stop_at=7) == 75
    shutil.rmtree(long)
    assert runs("cut", **begin) == 0, "it continues from its own folder"
    assert runs.rows("cut") == runs.rows("late") and runs.final("cut") == runs.final("late")


@pytest.mark.parametrize(
    ("step", "changed", "message"),
    [
        (2, {"schedule__warmup_epochs": 1, "resume": "auto"}, "is from the warm-up or the decay"),
        (8, {"schedule__epochs": 2}, "decays from step 6; train for 14 steps or more"),
        (2, {"schedule__decay_fraction": 1, "schedule__warmup_epochs": 0}, "set schedule.decay_fraction below 1"),
        (6, {"model__width": 9}, "has another config (model.width: 8 -> 9)"),
        (6, {"optim__algorithm": "muon", "resume": "force"}, "optim.algorithm"),
    ],
    ids=["warming-up", "too-late", "all-decay", "model", "algorithm"],
)
def test_unsuitable_checkpoint_is_refused(runs, long, capsys, step, changed, message):
    settings = {**WSD, "schedule__epochs": 4, "start_from": long / f"step_{step:08d}", **changed}
    assert runs("other", **settings) == 2
    assert message in capsys.readouterr().err
    assert not (runs.out / "other" / "metrics.jsonl").exists()


def test_force_starts_with_another_config(runs, long):
    assert runs("other", start_from=long / "step_00000006", resume="force", seed=3, schedule__epochs=2) == 0
    assert [row["step"] for row in runs.rows("other", "train")] == [7, 8, 9, 10]
