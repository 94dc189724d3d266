#!/usr/bin/env bash
# Train on a Slurm cluster with one process per GPU; the job saves and requeues itself before its time limit.
#
#     NODES=2 GPUS=8 scripts/cluster/slurm.sh scripts/pretrain_mae.py --config configs/mae/vit_b16_qdmoa_800ep.yaml
#     SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00 scripts/cluster/slurm.sh scripts/pretrain_lm.py --config ...
#
# NODES      number of machines (1)
# GPUS       processes and GPUs on each machine (8)
# CPUS       cores of each process, for its data workers (8)
# PYTHON     interpreter (.venv/bin/python, else python3)
# DRY_RUN=1  print the submission, submit nothing
# SBATCH_*   sbatch's variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_QOS ... (man sbatch)
#
# 420 s before the time limit Slurm sends SIGUSR1 to all processes. The run finishes its step, saves and exits with 75,
# and the job requeues itself. A step that waits for a stalled shard server can take 300 s of these. A run that fails
# (1) or has a wrong config (2) is not requeued. All machines must see the same files.
#
#     scancel --signal=USR1 JOB                                               save and requeue now
#     scontrol update JobId=JOB Requeue=0 && scancel --signal=USR1 JOB        save and stop for good
#
#SBATCH --job-name=moa
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@420
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^#SBATCH /{/^#SBATCH /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    job=(sbatch --nodes="${NODES:-1}" --ntasks-per-node="${GPUS:-8}" --gpus-per-node="${GPUS:-8}"
        --cpus-per-task="${CPUS:-8}" "$0" "$@")
    [ -n "${DRY_RUN:-}" ] || exec "${job[@]}"
    printf '%q ' "${job[@]}"
    echo
    exit 0
fi

cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
# shellcheck disable=SC2016  # each task expands its own variables
place='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
code=0
srun --kill-on-bad-exit=1 bash -c "$place" run "$python" "$@" || code=$?
if [ "$code" -eq 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
