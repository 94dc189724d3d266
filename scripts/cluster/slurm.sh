#!/usr/bin/env bash
# A run on a Slurm cluster, one process a GPU, that saves and queues itself again when its time is up.
#
#     NODES=2 GPUS=8 scripts/cluster/slurm.sh scripts/pretrain_mae.py --config configs/mae/vit_b16_qdmoa_800ep.yaml
#     SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00 scripts/cluster/slurm.sh scripts/pretrain_lm.py --config ...
#
# NODES      machines (1)
# GPUS       processes, and GPUs, on each (8)
# CPUS       cores of each process, for the workers that load its data (8)
# PYTHON     the interpreter (.venv/bin/python, else python3)
# DRY_RUN=1  print the submission, and what each process is on which node with which environment; submit nothing
# SBATCH_*   sbatch's own: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_QOS ... (man sbatch)
#
# 420 s before its time is up Slurm warns the job (SIGUSR1, to this script alone): the run saves and ends with 75, and
# the job is queued again, and continues. (The step at hand ends first: one that waits for a shard of a server that
# stalls can last 300 s, SERIES_S of moa_vision/cache.py; the rest is for the checkpoint.) A run that fails (1) or is wrong (2) is not; its code is the job's. To stop a
# job for good, saved: scancel --signal=TERM --batch JOB (75). A plain scancel goes to srun as well, which kills the run:
# the last checkpoint is left. All machines must see the same files.
#
#SBATCH --job-name=moa
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@420
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^#SBATCH /{/^#SBATCH /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
nodes=${SLURM_NNODES:-${NODES:-1}}
gpus=${SLURM_NTASKS_PER_NODE:-${GPUS:-8}}
cpus=${CPUS:-8}
for setting in "NODES $nodes" "GPUS $gpus" "CPUS $cpus"; do
    [[ $setting =~ ^[A-Z]+\ [1-9][0-9]*$ ]] && continue
    echo "error: ${setting/ / is }; it must be a whole number, 1 or above" >&2
    exit 2
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# What srun starts: a process of the run, which learns its place from Slurm's words for it.
# shellcheck disable=SC2016  # the variables are the task's
place='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
# --wait: the run's processes end each other (moa_train/failures.py); this is the net below. Not --kill-on-bad-exit,
# which would take the first 75 for a failure while others still write.
task=(srun --kill-on-bad-exit=0 --wait=120 bash -c "$place" run "$python" "$@")

submit() {
    local job=(sbatch --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
        --cpus-per-task="$cpus" "$0" "$@")
    [ -n "${DRY_RUN:-}" ] || exec "${job[@]}"
    printf '%q ' "${job[@]}"
    echo
}

show_processes() {  # NODE...
    local rank=0 node local_rank
    for node in "$@"; do
        for ((local_rank = 0; local_rank < gpus; local_rank++)); do
            printf 'on %s: RANK=%s LOCAL_RANK=%s WORLD_SIZE=%s MASTER_ADDR=%s MASTER_PORT=%s %s\n' "$node" "$rank" \
                "$local_rank" "$((nodes * gpus))" "$1" "${MASTER_PORT:-PORT}" "$(printf '%q ' "${command[@]}")"
            rank=$((rank + 1))
        done
    done
}

command=("$python" "$@")
if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit "$@"
    names=()
    for ((i = 0; i < nodes; i++)); do names+=("node$i"); done
    show_processes "${names[@]}"
    exit 0
fi

cd "${SLURM_SUBMIT_DIR:-.}"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take over sbatch's
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
if [ -n "${DRY_RUN:-}" ]; then
    show_processes "${hosts[@]}"
    exit 0
fi

# Either signal is passed on as SIGUSR1, which srun gives to every task; of SIGTERM it would kill them. `wait` returns
# early when a signal comes; the run is waited for again while it saves.
child=
warned=
again=
code=75
pass_on() { again=yes; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true; }
trap 'warned=yes; pass_on' USR1
trap pass_on TERM
"${task[@]}" &
child=$!
[ -z "$again" ] || pass_on  # it came before there was a child
again=yes
while [ -n "$again" ]; do
    again=
    status=0
    wait "$child" || status=$?
    [ "$status" -eq 127 ] || code=$status
done
# A run that failed after the warning is queued again as well: a signal may have hit it, or its compiler, before it could
# take one; were it at fault itself, it would fail again before the next warning.
if [ -n "$warned" ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
