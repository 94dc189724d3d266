"""scripts/cluster: what the dry runs print, and the recipes really run on two "machines" that are this one.

Slurm does not come with pip, so sbatch, srun and scontrol are imitations. They do what Slurm's manual says of what
the recipe relies on: a batch script that is warned by SIGUSR1 alone, an srun that passes SIGUSR1 on to its tasks,
kills them of SIGTERM and ends with the highest exit code, a job that is queued again.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_vision import cache

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
# Runs the job here, and again while it asks to be queued again; keeps its own arguments.
echo "$@" >>"$CLUSTER/sbatch"
for argument in "$@"; do
    case "$argument" in
    --nodes=*) export SLURM_NNODES=${argument#*=} ;;
    --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${argument#*=} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${argument#*=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
export SLURM_JOB_ID=41 SLURM_JOB_NODELIST=node0 SLURM_SUBMIT_DIR=$PWD
export SLURM_NTASKS=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))
while :; do
    rm -f "$CLUSTER/requeue"
    bash "$@" &
    echo $! >"$CLUSTER/batch"
    wait $!
    code=$?
    echo $code >>"$CLUSTER/codes"
    [ -f "$CLUSTER/requeue" ] || exit $code
done
"""

SRUN = r"""#!/bin/bash
# Runs a task for each place; SIGUSR1 they all get, SIGTERM kills them; ends with the highest exit code.
while [[ "$1" == --* ]]; do shift; done
tasks=()
trap 'interrupted=yes; kill -USR1 "${tasks[@]}" 2>/dev/null' USR1
trap 'interrupted=yes; kill -KILL "${tasks[@]}" 2>/dev/null' TERM
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    interrupted=yes
    while [ -n "$interrupted" ]; do
        interrupted=
        wait "$task"
        status=$?
        [ $status -eq 127 ] || code=$status
    done
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


def wait_for(condition, *processes):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def has_step(folder, step):
    metrics = folder / "run/metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def steps(folder):
    rows = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


def status(folder):
    return json.loads((folder / "run/summary.json").read_text())["status"]


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_without_arguments_they_tell_how_they_are_used(name):
    done = script(name)
    assert done.returncode == 2 and f"scripts/cluster/{name} scripts/pretrain_mae.py" in done.stderr
    assert "DRY_RUN" in done.stderr and "set -euo" not in done.stderr and "#SBATCH" not in done.stderr


def test_torchruns_dry_run_prints_the_command_for_every_machine():
    given = ("scripts/pretrain_lm.py", "--name", "two words")
    done = script("torchrun.sh", *given, DRY_RUN="1", NODES="2", GPUS="8", MASTER="node01:29400", RUN_ID="wide")
    assert done.returncode == 0, done.stderr
    first, command = done.stdout.splitlines()
    assert first == "on this machine, and in the same way on each of 2:"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node01:29400", "--rdzv-id", "wide"]
    assert shlex.split(command) == (
        [sys.executable, "-m", "moa_train.launch", "--nnodes", "2", "--nproc-per-node", "8", *meeting, *given]
    )


def test_several_machines_need_a_place_to_meet():
    done = script("torchrun.sh", "a.py", NODES="2")
    assert done.returncode == 2 and "NODES is 2, so MASTER must be HOST:PORT" in done.stderr


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
@pytest.mark.parametrize(("variable", "value"), [("NODES", "0"), ("NODES", "two"), ("GPUS", "two"), ("GPUS", "0")])
def test_a_number_that_is_none_is_named(name, variable, value):
    done = script(name, "a.py", DRY_RUN="1", **{variable: value})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {variable} is {value}; it must be a whole number, 1 or above\n"


def test_without_gpus_their_number_is_asked_for():
    done = script("torchrun.sh", "a.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert "GPUS=N" in done.stderr and "Traceback" not in done.stderr


def test_slurms_dry_run_prints_the_submission_and_every_process(tmp_path):
    """And starts nothing: sbatch is not even there."""
    given = ("scripts/pretrain_mae.py", "--name", "two words")
    done = script("slurm.sh", *given, DRY_RUN="1", NODES="2", GPUS="3", CPUS="5", MASTER_PORT="29500")
    assert done.returncode == 0, done.stderr
    submission, *processes = done.stdout.splitlines()
    sizes = ["--nodes=2", "--ntasks-per-node=3", "--gpus-per-node=3", "--cpus-per-task=5"]
    assert shlex.split(submission) == ["sbatch", *sizes, str(CLUSTER / "slurm.sh"), *given]
    assert len(processes) == 6
    for rank, line in enumerate(processes):
        node, local = divmod(rank, 3)
        place = [f"RANK={rank}", f"LOCAL_RANK={local}", "WORLD_SIZE=6", "MASTER_ADDR=node0", "MASTER_PORT=29500"]
        assert shlex.split(line) == ["on", f"node{node}:", *place, sys.executable, *given]


def test_slurms_warning_leaves_time_for_the_longest_step():
    """One that waits for a stalled shard, and the checkpoint after it."""
    (warned_s,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    assert int(warned_s) >= cache.RETRY_LIMIT_S + 120


@pytest.mark.slow
def test_two_machines_are_stopped_by_a_signal_to_one_and_continue(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = environment(NODES="2", GPUS="1", MASTER=f"127.0.0.1:{port}", LOCAL_ADDR="127.0.0.1")
    command = ["bash", str(CLUSTER / "torchrun.sh"), *arguments(tmp_path)]

    def machines():
        return [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]

    first = machines()
    try:
        wait_for(lambda: has_step(tmp_path, 2), *first)
        first[1].send_signal(signal.SIGTERM)
        said = [machine.communicate(timeout=240)[0] for machine in first]
    finally:
        for machine in first:
            machine.kill()
    assert [machine.returncode for machine in first] == [75, 75], said
    assert status(tmp_path) == "stopped" and "Traceback" not in "".join(said)
    done = steps(tmp_path)
    second = machines()
    said = [machine.communicate(timeout=240)[0] for machine in second]
    assert [machine.returncode for machine in second] == [0, 0], said
    assert status(tmp_path) == "finished" and steps(tmp_path) == list(range(1, 16)) and len(done) < 15
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of Slurm's commands, first on PATH, with what they note."""
    folder = tmp_path / "cluster"
    (folder / "bin").mkdir(parents=True)
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


def submit(folder, processes, **changed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = ["bash", str(CLUSTER / "slurm.sh"), *arguments(folder, **changed)]
    env = environment(NODES="1", GPUS=str(processes), MASTER_PORT=port)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def signal_batch(cluster, number):
    os.kill(int((cluster / "batch").read_text()), number)


@pytest.mark.slow
def test_a_job_that_is_warned_saves_is_queued_again_and_finishes(tmp_path, cluster):
    job = submit(tmp_path, 2)
    wait_for(lambda: has_step(tmp_path, 2), job)
    signal_batch(cluster, signal.SIGUSR1)
    wait_for(lambda: (cluster / "codes").exists(), job)
    assert status(tmp_path) == "stopped"
    said = job.communicate(timeout=240)[0]
    assert job.returncode == 0, said
    assert (cluster / "codes").read_text() == "0\n0\n"  # scontrol's, which has taken the script's place; the run's
    assert status(tmp_path) == "finished" and steps(tmp_path) == list(range(1, 16))
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "number", "code"),
    [({}, signal.SIGTERM, 75), ({"model.nan_at": 3}, None, 1), ({"schedule.batch_size": 7}, None, 2)],
    ids=["cancelled", "fails", "wrong"],
)
def test_a_job_that_is_not_queued_again_ends_with_the_runs_code(tmp_path, cluster, changed, number, code):
    job = submit(tmp_path, 1, **changed)
    if number is not None:
        wait_for(lambda: has_step(tmp_path, 2), job)
        signal_batch(cluster, number)
    said = job.communicate(timeout=240)[0]
    assert job.returncode == code, said
    assert (cluster / "codes").read_text() == f"{code}\n"
