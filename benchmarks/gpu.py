"""Everything that a GPU can confirm, by priority, in a given time: blocks and tests of the kernels, then benchmarks.

    python benchmarks/gpu.py --minutes 12 --out reports/gpu     measure; `make gpu` does the same
    python benchmarks/gpu.py --rehearse --out reports/rehearsal every job in a tiny form, on a CPU
    python benchmarks/gpu.py --publish --out docs/gpu           publish the results in README.md and docs/benchmarks.md

Each job is a process of its own that ends with the time. Its result is written as soon as it is there: DIR/NAME.log,
the CSV files of its tables, and DIR/results.json and DIR/README.md, which are renewed after every job and keep the
results of earlier commands on the same machine. A job whose package is missing is skipped. The job "tune" also writes
the fastest blocks into moa_ffn, and DIR/tune/blocks.json keeps them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
"""Pages with a block of results between `BEGIN` and `END`."""

BEGIN, END = "<!-- GPU results, written by benchmarks/gpu.py --publish -->", "<!-- end of GPU results -->"
PYTEST = "-m pytest -p no:cacheprovider -W default::DeprecationWarning -W default::FutureWarning"
GPU_TESTS = "tests/ffn/test_kernels.py tests/ffn/test_triton_layer.py"
IN_PARALLEL = " -n 8 --dist worksteal -p no:benchmark" if find_spec("xdist") else ""
"""Compilation of the kernels, on CPU cores, is most of the tests' time."""

TINY_LM = "--size dense-micro --layers 1"
TINY_STEP = f"overhead --models lm --modes uncompiled --variants qdmoa --rounds 1 {TINY_LM} --batch 1 --sequence 8"


class Job(NamedTuple):
    """One job.

    Attributes:
        name: Name in file names and headings.
        title: What it confirms.
        words: Arguments of `python -m benchmarks`, or of python if they begin with "-m".
        tiny: The same for a rehearsal.
        minutes: The most that it may take, so that one slow job does not use up the time of all others.
        needs: Optional package without which the job is skipped.
    """

    name: str
    title: str
    words: str
    tiny: str
    minutes: float
    needs: str = "torch"


JOBS = (
    Job(
        "tune",
        "Block shapes and warps of the kernels",
        "tune --save",
        "tune --tokens 2 --dim 12 --variants qdmoa --rounds 1",
        2,
    ),
    Job(
        "kernels",
        "Kernels equal the float64 reference",
        f"{PYTEST}{IN_PARALLEL} -m gpu {GPU_TESTS}",
        f"{PYTEST} -m 'not gpu' {GPU_TESTS} -k test_shapes",
        4,
    ),
    Job(
        "overhead-type-ii",
        "The paper's overhead table, Dense-0.5B, Type-II",
        "overhead --models lm --modes compiled --variants swiglu qdmoa",
        TINY_STEP,
        3,
    ),
    Job(
        "recipe",
        "MAE ViT-B/16 at the recipe's shapes",
        "recipe --modes compiled",
        "recipe --config configs/mae/laptop_qdmoa.yaml --batch 2 --product-size 16 --rounds 1 --batches 1",
        3,
    ),
    Job(
        "overhead-type-i",
        "The paper's overhead table, Dense-0.5B, Type-I",
        "overhead --models lm --modes compiled --variants relu2 moa",
        TINY_STEP.replace("qdmoa", "moa"),
        3,
    ),
    Job(
        "overhead-plain",
        "The same step with the layer in plain torch, compiled",
        "overhead --models lm --modes compiled --backend eager --variants swiglu qdmoa",
        TINY_STEP + " --backend eager",
        3,
    ),
    Job(
        "ffn",
        "The layer against copy bandwidth, eager, naive compiled and Liger",
        "ffn --variants swiglu qdmoa moa",
        "ffn --variants qdmoa --tokens 4 --dim 12 --rounds 1 --copy-mib 1 --modes uncompiled",
        3,
    ),
    Job(
        "overhead-mae",
        "The overhead table of the masked autoencoder",
        "overhead --models mae --modes compiled --variants swiglu qdmoa",
        "overhead --models mae --modes uncompiled --variants qdmoa --rounds 1 --layers 1 --vit-size tiny"
        " --image-size 32 --images 1",
        3,
    ),
    Job(
        "infer",
        "Inference",
        "infer --variants swiglu qdmoa --modes compiled",
        "infer --variants qdmoa --rounds 1 --batches 1 --vit-size tiny --image-size 32 --prompt 4 --new-tokens 2 "
        + TINY_LM,
        3,
    ),
    Job(
        "experts",
        "Grouped experts",
        "lm --tables lm-experts --modes uncompiled",
        "lm --tables lm-experts --modes uncompiled --expert-sizes moe-tiny --expert-tokens 3 --rounds 1",
        2,
    ),
    Job(
        "eval",
        "`lm_eval --model moa` against `hf`",
        "eval --size dense-0.5b --dtype bfloat16 --limit 100 --rounds 2",
        "eval --size dense-micro --tasks openbookqa --limit 3 --shots 0 --rounds 1 --batch-sizes 4",
        3,
        needs="lm_eval",
    ),
)


def main() -> int:
    """Run the jobs until the time is over; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="time for all jobs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="JOB", help="only these jobs")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--publish", action="store_true", help="only publish the results of --out")
    options = parser.parse_args()
    if options.publish:
        return publish(options.out)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; --rehearse runs every job in a tiny form")
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    machine = describe_machine(options.rehearse)
    results = earlier_results(options.out, machine)
    for job in (job for job in JOBS if options.only is None or job.name in options.only):
        left = end - time.monotonic()
        print(f"{job.name:<12} {left / 60:.1f} min left", flush=True)
        results[job.name] = run_job(job, options, left)
        print(f"{'':<12} {results[job.name]['status']}", flush=True)
        write_results(options.out, machine, results)
    print(options.out / "README.md")
    return int(any(result["status"].startswith("failed") for result in results.values()))


def run_job(job: Job, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a job; return its status, seconds, and tables as rows by name."""
    if find_spec(job.needs) is None:
        return {"status": f"skipped: {job.needs} is not installed", "tables": {}}
    if left < 5:
        return {"status": "no time left", "tables": {}}
    words = shlex.split(job.tiny if options.rehearse else job.words)
    folder = options.out / job.name
    if words[0] != "-m":
        device = "cpu" if options.rehearse else "cuda"
        words = ["-m", "benchmarks", *words, "--device", device, "--out", str(folder.absolute())]
    for old in folder.glob("*.csv"):
        old.unlink()
    begin, log = time.monotonic(), options.out / f"{job.name}.log"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(left, 60 * job.minutes),
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )
            status = "finished" if process.returncode == 0 else f"failed: {_reason(log)}"
        except subprocess.TimeoutExpired:
            status = "ran out of time"
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            tables[path.stem] = list(csv.DictReader(file))
    summary = _reason(log) if words[1] == "pytest" else ""
    return {"status": status, "summary": summary, "seconds": round(time.monotonic() - begin, 1), "tables": tables}


def _reason(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def describe_machine(rehearsal: bool) -> dict[str, str]:
    """Return device, driver, versions, commit and date."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    gpu = {} if rehearsal else {"GPU": torch.cuda.get_device_name(), "driver": output(*query)}
    return {
        **gpu,
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton_version,
        "Python": sys.version.split()[0],
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def earlier_results(out: Path, machine: dict[str, str]) -> dict[str, Any]:
    """Return the results of earlier jobs in `out`, if they are of this machine, commit and day."""
    path = out / "results.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content["jobs"] if content.get("machine") == machine else {}


def write_results(out: Path, machine: dict[str, str], results: dict[str, Any]) -> None:
    """Write results.json and the page."""
    (out / "results.json").write_text(json.dumps({"machine": machine, "jobs": results}, indent=2) + "\n")
    page = [f"# Measured on {machine.get('GPU', 'a CPU, as a rehearsal')}", ""]
    page += [", ".join(f"{name} {value}" for name, value in machine.items()) + "."]
    page += ["", "Command: `python benchmarks/gpu.py`. Columns: see docs/benchmarks.md.", ""]
    for job in (job for job in JOBS if job.name in results):
        result = results[job.name]
        page += [f"## {job.title}", "", f"{job.name}: {result['status']}. {result.get('summary', '')}".strip(), ""]
        for name, rows in result["tables"].items():
            page += [f"**{name}**", "", *_table(rows), ""]
    (out / "README.md").write_text("\n".join(page), encoding="utf-8")


def publish(out: Path) -> int:
    """Put the results of a measurement into the blocks of `PAGES`; refuse those of a rehearsal."""
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if "GPU" not in content["machine"]:
        print(f"error: {out / 'results.json'} was measured without a GPU", file=sys.stderr)
        return 2
    for page in PAGES:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{page} has no block between {BEGIN!r} and {END!r}")
        link = Path(os.path.relpath(out / "README.md", page.parent)).as_posix()
        lines = summarize(content["machine"], content["jobs"], link)
        page.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")
        print(page)
    return 0


def summarize(machine: dict[str, str], jobs: dict[str, Any], link: str) -> list[str]:
    """Return the lines of a block: overheads against the paper's, throughput of the recipe, speed of the harness."""

    def rows(job: str, table: str) -> list[dict[str, str]]:
        return jobs.get(job, {}).get("tables", {}).get(table, [])

    lines = [f"{machine['GPU']}, torch {machine['torch']}, commit {machine['commit']} ([all tables]({link})):", ""]
    lines += ["| | measured | paper |", "|---|---:|---:|"]
    if kernels := jobs.get("kernels"):
        tests = kernels["summary"].strip("= ") if kernels["status"] == "finished" else kernels["status"]
        lines += [f"| kernels against the float64 reference | {tests} | |"]
    for row in rows("overhead-type-ii", "overhead-lm") + rows("overhead-type-i", "overhead-lm"):
        if row["paper ratio"] not in ("", "1.00"):
            title = f"Dense-0.5B, compiled step, {row['variant']} over its Type-{row['type']} baseline: time, memory"
            paper = f"{row['paper ratio']}, {row['paper memory ratio']}"
            lines += [f"| {title} | {row['time ratio']}, {row['memory ratio']} | {paper} |"]
    for row in rows("recipe", "recipe"):
        if row["images/s"]:
            title = f"MAE step of {row['recipe']}: images/s, share of a matrix product's FLOP/s"
            lines += [f"| {title} | {row['images/s']}, {row['utilization']} | |"]
    for row in rows("eval", "eval"):
        if row["model"] == "moa":
            lines += [f"| `moa` over `hf`, {row['task']}, {row['shots']} shots: speed | {row['speed ratio']} | |"]
    return lines


def _table(rows: list[dict[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)] if rows else []
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
