"""The measurements of a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, recipe
from benchmarks.timing import Case
from moa_ffn.backends.triton import build
from moa_train.config import parse_config, read_config
from moa_vision.pretrain import MAEConfig

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


def test_later_commands_keep_earlier_results_and_skip_missing_packages(tmp_path, monkeypatch):
    words = "-m timeit -n 1 -r 1 pass"
    jobs = [
        gpu.Job(name, name, words, words, minutes=1, needs=needs) for name, needs in (("a", "torch"), ("b", "no_such"))
    ]
    monkeypatch.setattr(gpu, "JOBS", jobs)
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--only", name, "--out", str(tmp_path)])
        assert gpu.main() == 0
    statuses = {
        name: job["status"] for name, job in json.loads((tmp_path / "results.json").read_text())["jobs"].items()
    }
    assert statuses == {"a": "finished", "b": "skipped: no_such is not installed"}


def results(memory: str) -> dict[str, dict]:
    """Results of three jobs, with qd-MoA's memory ratio."""
    paper = {"paper ratio": "1.00", "paper memory ratio": "1.000"}
    rows = [
        {"type": "II", "variant": "swiglu", "time ratio": "1.000", "memory ratio": "1.000", **paper},
        {"type": "II", "variant": "qdmoa", "time ratio": "1.019", "memory ratio": memory, "paper ratio": "1.13"}
        | {"paper memory ratio": "1.004"},
    ]
    return {
        "kernels": {"status": "finished", "summary": "==== 120 passed in 61.2s ====", "tables": {}},
        "overhead-type-ii": {"status": "finished", "tables": {"overhead-lm": rows}},
        "eval": {"status": "failed: ModuleNotFoundError", "tables": {}},
    }


def test_publishing_replaces_the_blocks_of_the_pages(tmp_path, monkeypatch):
    pages, texts = [], [page.read_text() for page in gpu.PAGES]
    for page, text in zip(gpu.PAGES, texts, strict=True):
        pages.append(tmp_path / page.relative_to(gpu.ROOT))
        pages[-1].parent.mkdir(exist_ok=True)
        pages[-1].write_text(text)
    monkeypatch.setattr(gpu, "PAGES", pages)
    out = tmp_path / "docs" / "gpu"
    out.mkdir()
    machine = {"GPU": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
    for memory in ("1.001", "0.998"):  # the second replaces the first
        gpu.write_results(out, machine, results(memory))
        assert gpu.publish(out) == 0
        for page, before, link in zip(pages, texts, ("docs/gpu/README.md", "gpu/README.md"), strict=True):
            (head, rest), (old_head, old_rest) = (text.split(gpu.BEGIN) for text in (page.read_text(), before))
            block, tail = rest.split(gpu.END)
            assert (head, tail) == (old_head, old_rest.split(gpu.END)[1])
            assert f"NVIDIA H200, torch 2.11.0, commit abc ([all tables]({link})):" in block
            assert f"qdmoa over its Type-II baseline: time, memory | 1.019, {memory} | 1.13, 1.004 |" in block
            assert block.count("\n|") == 4 and "| 120 passed in 61.2s |" in block


def test_an_unfinished_test_run_is_published_as_such():
    jobs = {"kernels": {"status": "ran out of time", "summary": "....... [45%]", "tables": {}}}
    machine = {"GPU": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
    assert gpu.summarize(machine, jobs, "x")[-1] == "| kernels against the float64 reference | ran out of time | |"


def test_a_rehearsal_is_not_published(tmp_path, capsys):
    gpu.write_results(tmp_path, {"torch": "2.11.0"}, {})
    assert gpu.publish(tmp_path) == 2
    assert "measured without a GPU" in capsys.readouterr().err


def test_the_fastest_blocks_are_kept_by_gpu(tmp_path):
    tune = pytest.importorskip("benchmarks.tune")
    settings = [{"forward_warps": warps} for warps in (4, 1, 8)]
    cases = []
    for seconds in ((2.0, 1.0, 3.0), (1.0, 1.1, 0.8)):  # geometric means of ratios: 1, 0.74, 1.10
        own = [Case({}, print, seconds=[value]) for value in seconds]
        for case in own:
            case.baseline = own[0]
        cases += own
    assert tune.fastest(cases, settings) == {"forward_warps": 1}
    path = tmp_path / "blocks.json"
    for name, warps in (("A", 1), ("B", 2), ("A", 8)):
        tune.write_blocks(path, name, build.Blocks(forward_warps=warps))
    kept = json.loads(path.read_text())
    assert {name: build.Blocks(**blocks).forward_warps for name, blocks in kept.items()} == {"A": 8, "B": 2}


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/mae/*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_read_like_by_training(file):
    expected = parse_config(MAEConfig, [f"--config={file}"], program="", summary="")
    assert recipe.as_config(MAEConfig, read_config(file)) == expected


ABSENT = ("jsonargparse", "webdataset", "submitit", "datasets", "lm_eval", "torchcodec", "tifffile", "altair")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["kernels", "tune", "overhead-type-ii", "overhead-mae", "recipe", "ffn", "infer", "experts"]
)
def test_measurements_need_no_packages_of_data_and_reports(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery, sys\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        f"absent = {ABSENT!r}\n"
        "importlib.machinery.PathFinder.find_spec = classmethod("
        "lambda cls, name, *rest: None if name.partition('.')[0] in absent else find(name, *rest))\n"
    )
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--only", name, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, (tmp_path / f"{name}.log").read_text()
