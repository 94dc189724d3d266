"""The measurements of a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_every_job_finishes_in_a_rehearsal(tmp_path):
    pytest.importorskip("triton")
    done = rehearse(tmp_path, "--minutes", "15")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads((tmp_path / "results.json").read_text())["jobs"]
    assert {job["status"] for job in jobs.values()} == {"finished"}
    assert [name for name, job in jobs.items() if not job["tables"]] == ["kernels"]
    assert "passed" in jobs["kernels"]["summary"]
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n## ") == len(jobs) and "| qdmoa |" in page


def test_jobs_end_with_the_time(tmp_path):
    done = rehearse(tmp_path, "--minutes", "0.1", "--only", "ffn", "experts")
    assert done.returncode == 0, done.stderr
    statuses = [job["status"] for job in json.loads((tmp_path / "results.json").read_text())["jobs"].values()]
    assert statuses == ["ran out of time", "no time left"]
