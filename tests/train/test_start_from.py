"""Warmup-stable-decay: a run decayed from another's stable checkpoint is the run that would have decayed there."""

import shutil

import pytest

WSD = {
    "schedule__decay_fraction": 0.4,
    "schedule__decay_type": "1-sqrt",
    "checkpoint__interval": 2,
    "loop__log_every": 1,
}
"""Of 10 steps the last 4 decay, of 20 the last 8."""


@pytest.fixture
def long(runs):
    assert runs("long", schedule__epochs=4, checkpoint__keep_latest=1, checkpoint__keep_interval=2, **WSD) == 0
    return runs.out / "long" / "checkpoints"


def kept(checkpoints):
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


def test_every_kth_checkpoint_is_kept(runs, long):
    assert kept(long) == [*range(2, 21, 2)]
    assert runs("few", checkpoint__keep_latest=1, checkpoint__keep_interval=10) == 0
    assert kept(runs.out / "few" / "checkpoints") == [10, 15]


@pytest.mark.slow
def test_a_stable_checkpoint_decayed_later_is_the_run_that_decays_there(runs, long):
    assert runs("short", schedule__epochs=2, **WSD) == 0
    assert runs("late", schedule__epochs=2, start_from=long / "step_00000006", **WSD) == 0
    rows = {name: [row for row in runs.rows(name) if row["step"] > 6] for name in ("short", "late")}
    assert rows["late"] == rows["short"] and [row["step"] for row in runs.rows("late", "train")] == [7, 8, 9, 10]
    assert rows["late"][0]["lr"] == 0.01 > rows["late"][-2]["lr"]
    assert runs.final("late") == runs.final("short")


@pytest.mark.slow
def test_once_begun_it_goes_on_from_its_own_folder(runs, long):
    begin = {"schedule__epochs": 2, "start_from": long / "step_00000006", **WSD}
    assert runs("whole", **begin) == 0
    assert runs("cut", **begin, model__stop_at=7) == 75
    shutil.rmtree(long)
    assert runs("cut", **begin) == 0
    assert runs.rows("cut") == runs.rows("whole") and runs.final("cut") == runs.final("whole")


@pytest.mark.parametrize(
    ("step", "changed", "message"),
    [
        (14, {"schedule__epochs": 8}, "its rate still rose, or fell already"),
        (2, {"schedule__warmup_epochs": 1, "resume": "auto"}, "its rate still rose, or fell already"),
        (8, {"schedule__epochs": 2}, "rate falls from step 6 on; it takes 14 steps or more"),
        (2, {"schedule__decay_fraction": 1, "schedule__warmup_epochs": 0}, "it takes a decay_fraction below 1"),
        (6, {"model__width": 9}, "of a run with another configuration:\n  model.width: 8 -> 9"),
        (6, {"seed": 3}, "seed: 0 -> 3"),
        (7, {}, "start_from cannot be used"),
    ],
    ids=["decaying", "warming-up", "too-late", "all-decay", "model", "seed", "missing"],
)  # fmt: skip
def test_what_cannot_be_begun_with(runs, long, capsys, step, changed, message):
    settings = {**WSD, "schedule__epochs": 4, "start_from": long / f"step_{step:08d}", **changed}
    assert runs("other", **settings) == 2
    assert message in capsys.readouterr().err
    assert not (runs.out / "other" / "metrics.jsonl").exists()


def test_force_begins_all_the_same(runs, long):
    assert runs("other", start_from=long / "step_00000006", resume="force", seed=3, schedule__epochs=2) == 0
    assert [row["step"] for row in runs.rows("other", "train")] == [7, 8, 9, 10]


def test_keep_every_fits_save_every(runs, capsys):
    with pytest.raises(SystemExit):
        runs("odd", checkpoint__interval=4, checkpoint__keep_interval=6)
    assert (
        "checkpoint.keep_interval is 6; it must be a multiple of checkpoint.interval (4), or null"
        in capsys.readouterr().err
    )


def test_another_algorithm_cannot_take_the_optimizer_over(runs, long, capsys):
    begin = {"start_from": long / "step_00000006", "resume": "force", "schedule__epochs": 2}
    assert runs("other", optim__algorithm="muon", **begin) == 2
    assert "optim.algorithm" in capsys.readouterr().err
