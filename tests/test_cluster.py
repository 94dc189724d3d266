"""scripts/cluster: dry runs, and real runs on two "machines" that are this one.

sbatch, srun and scontrol are imitations with the behaviour of Slurm's manual: an sbatch that runs the job again after
a requeue, an srun that starts the tasks, ends all of them once one has failed, and exits with the highest exit code.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[1] / "scripts/cluster"
TOY = Path(__file__).parent / "train/toy.py"
RUN = {
    "name": "run",
    "optim.lr": 0.01,
    "schedule.epochs": 3,
    "schedule.batch_size": 8,
    "loop.micro_batch_size": 4,
    "loop.log_every": 1,
    "loop.trackers": "[]",
    "model.step_s": 0.3,
}

SBATCH = r"""#!/bin/bash
for argument in "$@"; do
    case "$argument" in
    --ntasks-per-node=*) export SLURM_NTASKS=${argument#*=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
export SLURM_JOB_ID=41 SLURM_JOB_NODELIST=node0 SLURM_SUBMIT_DIR=$PWD
while :; do
    rm -f "$CLUSTER/requeue"
    bash "$@"
    code=$?
    echo $code >>"$CLUSTER/codes"
    [ -f "$CLUSTER/requeue" ] || exit $code
done
"""

SRUN = r"""#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
done
jobs -p >"$CLUSTER/tasks"
highest=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    wait -n
    code=$?
    [ $code -eq 0 ] || kill $(jobs -p) 2>/dev/null
    [ $code -le $highest ] || highest=$code
done
exit $highest
"""

SCONTROL = r"""#!/bin/bash
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >"$CLUSTER/requeue" ;;
esac
"""


def arguments(folder, **changed):
    return [str(TOY), f"--out={folder}", *(f"--{key}={value}" for key, value in (RUN | changed).items())]


def environment(**more):
    return os.environ | {"PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | more


def script(name, *given, **env):
    command = ["bash", str(CLUSTER / name), *given]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=600)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def wait_for_step(folder, step, *processes):
    metrics, deadline = folder / "run/metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def steps(folder):
    rows = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


def status(folder):
    return json.loads((folder / "run/summary.json").read_text())["status"]


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_usage_without_arguments(name):
    done = script(name)
    assert done.returncode == 2 and f"scripts/cluster/{name} scripts/pretrain_mae.py" in done.stderr
    assert "DRY_RUN" in done.stderr and "set -euo" not in done.stderr and "#SBATCH" not in done.stderr


def test_torchrun_dry_run():
    given = ("scripts/pretrain_lm.py", "--name", "two words")
    done = script("torchrun.sh", *given, DRY_RUN="1", NODES="2", GPUS="8", MASTER="node01:29400", RUN_ID="wide")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:7] == [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "8"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node01:29400", "--rdzv-id", "wide"]
    assert command[7:13] == rendezvous and tuple(command[-3:]) == given


def test_slurm_dry_run():
    given = ("scripts/pretrain_mae.py", "--name", "two words")
    done = script("slurm.sh", *given, DRY_RUN="1", NODES="2", GPUS="3", CPUS="5", SLURM_JOB_ID="")
    sizes = ["--nodes=2", "--ntasks-per-node=3", "--gpus-per-node=3", "--cpus-per-task=5"]
    assert shlex.split(done.stdout) == ["sbatch", *sizes, str(CLUSTER / "slurm.sh"), *given]


@pytest.mark.slow
def test_signal_to_one_of_two_machines_stops_both_and_they_continue(tmp_path):
    env = environment(NODES="2", GPUS="1", MASTER=f"127.0.0.1:{free_port()}", LOCAL_ADDR="127.0.0.1")
    command = ["bash", str(CLUSTER / "torchrun.sh"), *arguments(tmp_path)]

    def machines():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]

    first = machines()
    try:
        wait_for_step(tmp_path, 2, *first)
        first[1].send_signal(signal.SIGUSR1)
        output = [machine.communicate(timeout=240)[0] for machine in first]
    finally:
        for machine in first:
            machine.kill()
    assert status(tmp_path) == "stopped" and len(steps(tmp_path)) < 15, output
    assert 0 not in [machine.returncode for machine in first]
    second = machines()
    output = [machine.communicate(timeout=240)[0] for machine in second]
    assert [machine.returncode for machine in second] == [0, 0], output
    assert status(tmp_path) == "finished" and steps(tmp_path) == list(range(1, 16))
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Put the imitations first on PATH; return the folder with their notes."""
    folder = tmp_path / "cluster"
    (folder / "bin").mkdir(parents=True)
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


def submit(folder, processes, **changed):
    command = ["bash", str(CLUSTER / "slurm.sh"), *arguments(folder, **changed)]
    env = environment(GPUS=str(processes), MASTER_PORT=free_port())
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_warned_job_saves_requeues_and_finishes(tmp_path, cluster):
    job = submit(tmp_path, 2)
    wait_for_step(tmp_path, 2, job)
    for task in (cluster / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    assert (cluster / "codes").read_text() == "0\n0\n"  # of scontrol, which replaces the first job script; of the run
    assert output.count("stopped     SIGUSR1: saved") == 1 and "Traceback" not in output
    assert status(tmp_path) == "finished" and steps(tmp_path) == list(range(1, 16))
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_failed_job_is_not_requeued(tmp_path, cluster):
    job = submit(tmp_path, 2, **{"model.nan_at": 3})
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 1, output
    assert (cluster / "codes").read_text() == "1\n"
    assert output.count("error: ") == 1, output
