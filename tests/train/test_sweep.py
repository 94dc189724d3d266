"""Sweeps: expansion into runs, checks, execution with real processes, and Slurm with imitated commands."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from moa_train.config import RESUME_MUTABLE_KEYS
from moa_train.signals import EXIT_STOPPED
from moa_train.sweep import launch
from moa_train.sweep.cli import main
from moa_train.sweep.grid import Trainer, expand, parse_seeds, parse_settings
from moa_train.sweep.launch import slot_environments
from moa_train.sweep.state import SweepRun

ROOT = Path(__file__).parents[2]

REPORT_SCRIPT = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "report.json").write_text(json.dumps(sys.argv[1:]))
"""


class Sweeps:
    """Sweeps of the toy script over the configs "one" and "two", in the working directory."""

    def __init__(self):
        spec = importlib.util.spec_from_file_location("toy_train", "train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["toy_train"] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
        self.trainer = Trainer(Path("train.py").absolute(), module.main, RESUME_MUTABLE_KEYS)

    def __call__(self, *arguments, configs=("one", "two")):
        """Run a sweep in this process and return its exit code."""
        return main(
            ["--config", *(f"{name}.yaml" for name in configs), "--out", "runs", *arguments],
            find_trainer=lambda files: self.trainer,
            report=[sys.executable, "report.py"],
        )

    def log(self, name):
        return Path("runs/logs", f"{name}.log").read_text()

    def steps(self, name):
        return [json.loads(line)["step"] for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]

    def reported(self):
        return json.loads(Path("reports/runs/report.json").read_text())


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(launch, "POLL_S", 0.02)
    shutil.copy(Path(__file__).with_name("sweep_toy.py"), "train.py")
    Path("report.py").write_text(REPORT_SCRIPT)
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(f"name: {name}\nschedule: {{epochs: 2}}\n")
    return Sweeps()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Expansion


def test_values_are_split_at_commas_outside_of_brackets_and_quotes():
    text = """k=[0.9,0.95],{a: 1, b: [2, 3]},'g,s,r2',"x,'y",z"""
    assert parse_settings([text])["k"] == ("[0.9,0.95]", "{a: 1, b: [2, 3]}", "g,s,r2", "x,'y", "z")


def test_order_names_and_arguments(sweeps):
    values = {"optim.lr": ("0.0003",), "model.encoder.gate": ("c,d",), "model.decoder.gate": ("a", "b")}
    runs = expand([Path("one.yaml")], values, parse_seeds("0,5"), out=Path("runs/x"), extra=["--schedule.epochs", "3"])
    assert [run.arguments[-2] for run in runs] == ["--seed=0", "--seed=0", "--seed=5", "--seed=5"]
    assert runs[0].name == "one_lr0.0003_gatec-d_gatea_s0"
    assert runs[0].arguments[:5] == ["--config", "one.yaml", "--schedule.epochs", "3", "--optim.lr=0.0003"]
    assert parse_seeds("3") == (0, 1, 2) and parse_seeds("7,") == (7,)


# Checks before the first run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optim.lrr=1e-3"], "did you mean optim.lr?"),
        (["--set", "optim.lr=1e-3,-1"], "one_lr-1_s0: optim.lr is -1.0; it must be above 0"),
        (["--set", "optim.lr"], "must be KEY=VALUE"),
        (["--set", "optim.lr=1,,2"], "are not a YAML list"),
        (["--set", "optim.lr=1", "--set", "optim.lr=2"], "--set optim.lr is given twice"),
        (["--set", "seed=1,2"], "use --seeds"),
        (["--seeds", "1,,2"], "--seeds is '1,,2'"),
        (["--seeds", "1,1"], "several runs would be named one_s1"),
        (["--", "--seed=3"], "--seed after -- is not allowed: use --seeds"),
        (["--launch", "acelerate launch"], "--launch starts with 'acelerate'"),
        (["--jobs", "0"], "--jobs is 0; it must be 1 or above"),
        (["--executor", "slurm", "--sbatch", "partition"], "it must be KEY=VALUE"),
        (["--sbatch", "partition=x"], "--sbatch has no effect without --executor slurm"),
    ],
)
def test_mistakes_are_reported_before_the_first_run(sweeps, capsys, arguments, message):
    assert sweeps(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_dry_run_prints_states_and_commands(sweeps, capsys):
    assert sweeps("--no-report", configs=["two"]) == 0
    capsys.readouterr()
    assert sweeps("--dry-run", "--launch", "nice -n 1") == 0
    first, second, _, *table = capsys.readouterr().out.splitlines()
    assert first == "waiting   nice -n 1 train.py --config one.yaml --name=one_s0 --seed=0 --out=runs"
    assert second.startswith("finished  nice -n 1 train.py --config two.yaml")
    assert [row.split()[:4] for row in table] == [["one_s0", "waiting", "0", "0"], ["two_s0", "finished", "4", "4"]]
    assert not Path("runs/one_s0").exists()


# Local execution


def test_failed_and_diverged_runs_do_not_end_the_sweep(sweeps, capsys):
    arguments = ("--set", "trouble=fails,diverges,none", "--jobs", "2", "--title", "T", "--baseline", "two")
    assert sweeps(*arguments, configs=["one"]) == 1
    out = capsys.readouterr().out
    assert "failed      one_troublefails_s0" in out and "RuntimeError: the disk is full" in out
    assert re.search(r"one_troublenone_s0 +finished +4 +4 +0.25\s", out)
    assert re.search(r"one_troublediverges_s0 +diverged +2 +4\s", out)
    done = ["runs/one_troublediverges_s0", "runs/one_troublenone_s0"]
    assert sweeps.reported() == [*done, "--out", "reports/runs", "--title", "T", "--baseline", "two"]

    before = {path: path.stat().st_mtime_ns for name in done for path in Path(name).iterdir()}
    assert sweeps(*arguments, configs=["one"]) == 1  # only what failed is started again
    assert "3 run(s): 1 finished, 1 diverged, 1 waiting" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sweeps.log("one_troublefails_s0").count("starts at 1, threads 1") == 1


ENTRY_SCRIPT = """
import sys
from pathlib import Path
import train
from moa_train.sweep.cli import main
from moa_train.sweep.grid import Trainer
trainer = Trainer(Path("train.py"), train.main, frozenset())
sys.exit(main(sys.argv[1:], find_trainer=lambda files: trainer, report=["false"]))
"""


@pytest.fixture
def terminal_sweep(sweeps):
    """A function that starts a sweep in a new process group, as a terminal does, and awaits its first step."""

    def start(trouble):
        Path("sweep.py").write_text(ENTRY_SCRIPT)
        words = ["--config", "one.yaml", "--out", "runs", "--set", f"trouble={trouble}", "--no-report"]
        process = subprocess.Popen([sys.executable, "sweep.py", *words], start_new_session=True)
        wait_for(Path(f"runs/one_trouble{trouble}_s0/metrics.jsonl").exists)
        return process

    return start


def test_ctrl_c_of_a_terminal_lets_runs_save(sweeps, terminal_sweep):
    process = terminal_sweep("waits")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == EXIT_STOPPED
    assert json.loads(Path("runs/one_troublewaits_s0/summary.json").read_text()) == {"status": "stopped"}
    assert sweeps("--set", "trouble=waits", configs=["one"]) == 0
    assert sweeps.steps("one_troublewaits_s0") == [1, 2, 3, 4]


@pytest.mark.slow
def test_second_ctrl_c_kills_the_runs(terminal_sweep):
    process = terminal_sweep("hangs")
    tree = psutil.Process(process.pid).children(recursive=True)
    assert any("train.py" in child.cmdline() for child in tree)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(4)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == EXIT_STOPPED
    assert not psutil.wait_procs(tree, timeout=10)[1]


def test_parallel_runs_share_gpus_and_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(2, four)] == ["4,5", "6,7"]
    assert slot_environments(1, four) == [{}]
    assert slot_environments(3, {"CUDA_VISIBLE_DEVICES": ""}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slot_environments(2, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "5"}) == [{}, {}]


def test_states_of_runs_of_the_trainer(runs):
    assert runs("finished") == 0
    assert runs("stopped", model__stop_at=6) == EXIT_STOPPED
    assert runs("diverged", model__nan_at=8) == 1
    found = {}
    for name in ("finished", "stopped", "diverged"):
        run = SweepRun(name, runs.out / name, Path(), [])
        run.settle("failed")
        found[name] = (run.state, run.step, run.total_steps)
    assert found == {"finished": ("finished", 15, 15), "stopped": ("failed", 7, 15), "diverged": ("diverged", 9, 15)}


# Slurm

SBATCH = r"""#!/bin/bash
# Starts the tasks of a job array, or a single job, and returns at once; a task that is requeued starts again.
cp "$1" "$CLUSTER/script"
echo x >>"$CLUSTER/submitted"
number=$((40 + $(wc -l <"$CLUSTER/submitted")))
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p' "$1")
for task in $(seq 0 "${last:-0}"); do
    id=$number${last:+_$task}
    touch "$CLUSTER/queue/$id"
    (
        export SLURM_JOB_ID=$((number + task)) ${last:+SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task}
        again=yes
        while [ -n "$again" ]; do
            bash "$1" &
            echo $! >"$CLUSTER/pid"
            wait $!
            again=$(cat "$CLUSTER/requeued/$id" 2>/dev/null)
            rm -f "$CLUSTER/requeued/$id"
        done
        rm "$CLUSTER/queue/$id"
    ) >>"$CLUSTER/out" 2>&1 </dev/null &
done
echo "Submitted batch job $number"
"""

SQUEUE = """#!/bin/bash
for job in $(ls "$CLUSTER/queue"); do echo "$job RUNNING"; done
"""

SCONTROL = """#!/bin/bash
echo "$1" >"$CLUSTER/requeued/$2"
"""


@pytest.fixture
def cluster(sweeps, monkeypatch):
    """A folder with imitated Slurm commands on PATH; its folder "queue" holds a file per queued job."""
    folder = Path("cluster").absolute()
    for name in ("queue", "requeued", "bin"):
        (folder / name).mkdir(parents=True)
    commands = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "srun": "#!/bin/bash\n"}
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    yield folder
    for process in psutil.process_iter(["cmdline"]):  # jobs that the test left running
        if any(str(folder.parent) in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


SLURM = ("--executor", "slurm", "--sbatch", "gres=gpu:8", "time=24:00:00", "--jobs", "2")


@pytest.mark.slow
def test_job_array_is_submitted_once_and_reported_at_the_end(sweeps, cluster, capsys):
    words = ("--set", "trouble=waits,fails", *SLURM)
    assert sweeps(*words, configs=["one"]) == 0
    out = capsys.readouterr().out
    assert "submitted   2 run(s) as job 41" in out and "one_troublewaits_s0  queued" in out
    script = (cluster / "script").read_text()
    for option in ("array=0-1%2", "gres=gpu:8", "time=24:00:00", "signal=B:USR2@120", "requeue"):
        assert f"#SBATCH --{option}\n" in script
    wait_for(lambda: (cluster / "out").read_text().count("disk is full") or not (cluster / "queue/41_1").exists())
    assert sweeps(*words, configs=["one"]) == 0  # only what failed is submitted again
    out = capsys.readouterr().out
    assert "submitted   1 run(s) as job 42" in out and "one_troublewaits_s0  running" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "starts"),
    [(signal.SIGUSR2, ["starts at 0", "starts at 1"]), (signal.SIGTERM, ["starts at 0"])],
    ids=["time limit", "scancel"],
)
def test_job_saves_and_is_requeued_unless_cancelled(sweeps, cluster, number, starts):
    words = ("--set", "trouble=waits", *SLURM)
    assert sweeps(*words, configs=["one"]) == 0
    wait_for(Path("runs/one_troublewaits_s0/metrics.jsonl").exists)
    os.kill(int((cluster / "pid").read_text()), number)
    wait_for(lambda: not list((cluster / "queue").iterdir()))
    log = sweeps.log("one_troublewaits_s0").splitlines()
    assert [line.partition(",")[0] for line in log if "starts" in line] == starts
    status = json.loads(Path("runs/one_troublewaits_s0/summary.json").read_text())["status"]
    assert status == ("finished" if len(starts) == 2 else "stopped")
    if status == "finished":
        assert sweeps(*words, configs=["one"]) == 0
        assert sweeps.reported() == ["runs/one_troublewaits_s0", "--out", "reports/runs"]


@pytest.mark.parametrize(
    ("words", "message"), [((), "needs sbatch"), (("--sbatch", "partition=x"), "--sbatch has no time limit")]
)
def test_slurm_needs_its_commands_and_a_time_limit(sweeps, cluster, capsys, monkeypatch, words, message):
    if not words:
        (cluster / "bin/sbatch").unlink()
    assert sweeps("--executor", "slurm", *words) == 2
    assert message in capsys.readouterr().err


# scripts/sweep.py


@pytest.fixture
def task_kind(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("task_kind")


@pytest.mark.parametrize(
    ("content", "script"),
    [("model: {encoder: vit}", "pretrain_mae.py"), ("model: {size: dense-micro}", "pretrain_lm.py")],
)
def test_training_script_and_evaluators_follow_from_the_model(tmp_path, task_kind, content, script):
    file = tmp_path / "some.yaml"
    file.write_text(content)
    assert task_kind.training_script([file]) == ROOT / "scripts" / script
    checked: Any = importlib.import_module("sweep").find_trainer([file]).main
    evaluators = importlib.import_module(script.removesuffix(".py")).EVALUATORS
    assert evaluators and checked.keywords == {"evaluators": evaluators}


@pytest.mark.slow
def test_sweep_script_checks_and_trains(sweeps, monkeypatch):
    """scripts/sweep.py on a model of one block and images of 16 pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    with tarfile.open("tiny.tar", "w") as tar:
        for number in range(4):
            Image.new("RGB", (16, 16)).save(f"{number}.png")
            tar.add(f"{number}.png")
    small = {"model.img_size": 16, "model.encoder_args.depth": 1, "model.decoder_depth": 1, "loop.trackers": "[]"}
    small |= {"data.train": "tiny.tar", "data.val": "null", "data.repeated_augmentation": 1, "schedule.batch_size": 2}
    small |= {"loop.micro_batch_size": 2, "schedule.epochs": 1, "schedule.warmup_epochs": 0}
    extra = ["--", *(f"--{key}={value}" for key, value in small.items())]
    config = str(ROOT / "configs/mae/laptop_swiglu.yaml")
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), "--config", config, "--out", "runs", "--no-report"]

    def run(setting):
        return subprocess.run([*command, "--set", setting, *extra], capture_output=True, text=True, check=False)

    wrong = run("model.mask_ratio=2")
    assert (
        wrong.returncode == 2 and "laptop_swiglu_mask_ratio2_s0: " in wrong.stderr and "Traceback" not in wrong.stderr
    )
    assert not Path("runs").exists()
    assert re.search(r"laptop_swiglu_lr2e-3_s0 +finished +2 +2", run("optim.lr=2e-3").stdout)
