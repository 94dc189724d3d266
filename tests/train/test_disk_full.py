"""A full disk: the old checkpoint stays, the run goes on, and says so. The limit on a file's size that a process can
be given fails writes as a full disk does, in the kernel."""

import errno
import json
import resource

import pytest

from moa_train import checkpoint
from moa_train.atomic_io import LineFile


@pytest.fixture
def limited(runs, ranks):
    """limited(size, ...) runs where files have at most `size` bytes; returns the exit code, and what was said."""

    def run(size, **changed):
        (code,) = ranks(count=1, model__max_file=size, **changed)
        return code, (runs.out / "run.out").read_text()

    return run


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(runs, ranks, limited):
    """Rows fit (3 kB), checkpoints (of 400 units 12 kB and more) do not; then there is room again."""
    wide = {"model__width": 400, "loop__log_every": 5, "loop__val_every": 50}
    assert runs("unbroken", **wide) == 0
    assert runs("run", **wide, model__stop_at=4) == 75
    code, out = limited(8_000, **wide)
    assert code == 1 and "the last checkpoint could not be written" in ranks.said
    assert "Traceback" not in ranks.said
    assert out.count("step_00000010 could not be written") == 1 and "newest checkpoint: step 5" in out
    newest, damaged = checkpoint.newest_valid(runs.out / "run" / "checkpoints")
    assert newest.name == "step_00000005" and damaged == []
    assert not list((runs.out / "run").rglob(".*")), "no half of a file is left"
    events = [json.loads(line) for line in (runs.out / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["kind"] == "not_saved"] == [7, 10, 12, 15, 15], (
        "the last one is tried twice"
    )
    assert runs("run", **wide) == 0
    runs.assert_same("run", "unbroken")


def test_a_stop_that_could_not_be_saved_is_no_stop_to_go_on_from(limited, ranks):
    """Not exit code 75, with which a cluster would queue it again and again."""
    code, _ = limited(8_000, model__width=400, loop__val_every=50, model__stop_at=9)
    assert code == 1 and "the last checkpoint could not be written" in ranks.said


@pytest.mark.slow
def test_rows_and_trackers_that_do_not_fit(runs, limited):
    """metrics.jsonl and TensorBoard's file are full after some steps: the run goes on, and no row is cut in two."""
    code, out = limited(4_000, schedule__epochs=8, checkpoint__interval=100, loop__trackers='["tensorboard"]')
    assert out.count("metrics.jsonl could not be written") == 1, "told once"
    assert out.count("trackers (tensorboard) failed") == 1
    assert "step 40/40" in out and code in (0, 1), "to the end; whether the last checkpoint fits is another question"
    rows = runs.rows("run", "train")
    assert 0 < len(rows) < 40 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_run_folder_that_cannot_be_written(runs, ranks, limited):
    (code, _) = limited(100)
    assert code == 1 and "the run folder cannot be written to" in ranks.said and "Traceback" not in ranks.said


def test_lines_are_whole_or_absent_and_come_later(tmp_path):
    path = tmp_path / "lines"
    path.write_text("one\ntw")
    lines = LineFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard))
    try:
        lines.append("two")
        with pytest.raises(OSError, match=f"Errno {errno.EFBIG}|Errno {errno.ENOSPC}"):
            lines.append("three, too long")
        assert path.read_text() == "one\ntwo\n"
        with pytest.raises(OSError, match="Errno"):
            lines.append("four")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.append("five")
    assert path.read_text() == "one\ntwo\nthree, too long\nfour\nfive\n"


@pytest.mark.parametrize("content", ["", "cut short", "x" * 200_000 + "\ncut", "y" * 200_000])
def test_a_line_cut_short_is_taken_away_first(tmp_path, content):
    path = tmp_path / "lines"
    path.write_text(content)
    LineFile(path).append("new")
    whole = content[: content.rfind("\n") + 1]
    assert path.read_text() == whole + "new\n"
