#!/usr/bin/env bash
# A run on one machine or several, without a scheduler: the same command on each of them.
#
#     scripts/cluster/torchrun.sh scripts/pretrain_mae.py --config configs/mae/vit_b16_qdmoa_800ep.yaml
#     NODES=2 MASTER=node01:29400 scripts/cluster/torchrun.sh scripts/pretrain_lm.py --config ...
#
# NODES      machines (1)
# GPUS       processes on each (its GPUs)
# MASTER     one of the machines and a free port of it, where they meet; needed for several
# RUN_ID     tells runs that meet at one place apart (moa)
# LOCAL_ADDR this machine's name or address for the others, where its own name will not do
# PYTHON     the interpreter (.venv/bin/python, else python3)
# DRY_RUN=1  print what would be started here, and start nothing
#
# Ctrl-C, SIGTERM or SIGUSR1, to any one of the machines' commands, saves and ends the run on all; the same commands
# continue it. Exit codes are the run's: 0 finished, 1 failed, 2 wrong configuration, 75 stopped and saved.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
nodes=${NODES:-1}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
gpus=${GPUS:-gpu}
for setting in "NODES $nodes" "GPUS ${GPUS:-1}"; do
    [[ $setting =~ ^[A-Z]+\ [1-9][0-9]*$ ]] && continue
    echo "error: ${setting/ / is }; it must be a whole number, 1 or above" >&2
    exit 2
done

if [ "$nodes" -eq 1 ]; then
    meeting=(--standalone)
elif [ -n "${MASTER:-}" ]; then
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${RUN_ID:-moa}")
    [ -z "${LOCAL_ADDR:-}" ] || meeting+=(--local-addr "$LOCAL_ADDR")
else
    echo "error: NODES is $nodes, so MASTER must be HOST:PORT of one of them, the same on all" >&2
    exit 2
fi
command=("$python" -m moa_train.launch --nnodes "$nodes" --nproc-per-node "$gpus" "${meeting[@]}" "$@")

if [ -n "${DRY_RUN:-}" ]; then
    echo "on this machine, and in the same way on each of $nodes:"
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
