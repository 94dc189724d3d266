"""A full disk: the old checkpoint stays, the run goes on, and says so. The limit on a file's size that a process can
be given fails writes as a full disk does, in the kernel."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from moa_train import checkpoint
from moa_train.durable import LineFile

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
del sys.argv[0:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def limited(runs, size, name, **changed):
    """Run with files of at most `size` bytes."""
    command = [sys.executable, "-B", "-c", LIMITED, str(size), str(runs.script), *runs.arguments(name, **changed)]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_checkpoints_that_do_not_fit(runs):
    """Rows fit (3 kB), checkpoints (of 400 units 12 kB and more) do not; then there is room again."""
    wide = {"model__width": 400, "loop__log_every": 5, "loop__val_every": 50}
    assert runs("unbroken", **wide) == 0
    assert runs("run", **wide, model__stop_at=4) == 75
    done = limited(runs, 8_000, "run", **wide)
    assert done.returncode == 1, done.stderr
    assert "could not be exported" in done.stderr and "Traceback" not in done.stderr
    told = done.stdout.count("could not be written")
    assert told == 2 and "newest checkpoint: step 5" in done.stdout, "those of steps 10 and 15"
    newest, damaged = checkpoint.newest_valid(runs.out / "run" / "checkpoints")
    assert newest.name == "step_00000005" and damaged == []
    assert not list((runs.out / "run").rglob(".*")), "no half of a file is left"
    events = [json.loads(line) for line in (runs.out / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["kind"] == "not_saved"] == [10, 15]
    assert runs("run", **wide) == 0
    runs.assert_same("run", "unbroken")


def test_rows_that_do_not_fit_wait_for_room(runs):
    """At 2 kB metrics.jsonl is full after some steps; the run goes on, and no row is cut in two."""
    done = limited(runs, 2_000, "run", loop__save_every=100)
    assert "metrics.jsonl could not be written" in done.stdout, done.stderr
    rows = runs.rows("run", "train")
    assert 0 < len(rows) < 15 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))


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
