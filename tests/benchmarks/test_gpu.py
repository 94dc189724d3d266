"""The measurements of a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_job_finishes_in_a_rehearsal(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--minutes", "15", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads((tmp_path / "results.json").read_text())["jobs"]
    assert {job["status"] for job in jobs.values()} == {"finished"}
    assert [name for name, job in jobs.items() if not job["tables"]] == ["kernels"]
    assert "passed" in jobs["kernels"]["summary"]
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n## ") == len(jobs) and "| qdmoa |" in page


def test_jobs_end_with_the_time(tmp_path, monkeypatch):
    words = """-m timeit -n 1 -r 1 "__import__('time').sleep(60)" """
    jobs = [gpu.Job(name, name, words, words, minutes=0.02) for name in ("first", "second")]
    monkeypatch.setattr(gpu, "JOBS", jobs)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--minutes", "0.1", "--out", str(tmp_path)])
    assert gpu.main() == 0
    statuses = [job["status"] for job in json.loads((tmp_path / "results.json").read_text())["jobs"].values()]
    assert statuses == ["ran out of time", "no time left"]
