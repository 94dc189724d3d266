#!/usr/bin/env bash
# Train on one machine or several without a scheduler; run the same command on each machine.
#
#     scripts/cluster/torchrun.sh scripts/pretrain_mae.py --config configs/mae/vit_b16_qdmoa_800ep.yaml
#     NODES=2 MASTER=node01:29400 scripts/cluster/torchrun.sh scripts/pretrain_lm.py --config ...
#
# NODES      number of machines (1)
# GPUS       processes on each machine (all its GPUs)
# MASTER     HOST:PORT of one of the machines; required for several
# RUN_ID     separates runs that share a MASTER (moa)
# LOCAL_ADDR address of this machine for the others (its host name)
# PYTHON     interpreter (.venv/bin/python, else python3)
# DRY_RUN=1  print the command, start nothing
#
# Ctrl-C, SIGTERM or SIGUSR1 to the command on one machine saves and stops the run on all; the same commands continue
# it. torchrun kills a run that has not saved after 30 s, and exits with 1 whether a run was stopped or failed: the
# status is in RUN/summary.json.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
nodes=${NODES:-1}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ "$nodes" -eq 1 ]; then
    rendezvous=(--standalone)
else
    master=${MASTER:?must be HOST:PORT of one of the machines, the same on all, since NODES is above 1}
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id "${RUN_ID:-moa}")
    [ -z "${LOCAL_ADDR:-}" ] || rendezvous+=(--local-addr "$LOCAL_ADDR")
fi
command=("$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" "${rendezvous[@]}"
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
