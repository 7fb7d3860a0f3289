#!/usr/bin/env bash
# Train on one or two machines: run the same line on both, in the repository, with a shared disk.
#
#     launch/nodes.sh HOST:29500 my_run --config configs/u2net_full.yaml --data-path /data/DUTS
#
# HOST is the machine that is started first and must stay. If the other one is lost, or comes later,
# torchrun starts the processes anew on the machines that are there: they go on from the last
# checkpoint in runs/my_run, with the same global batch in the same order.
#
# Trusted networks only: torchrun listens on all addresses, and whoever reaches HOST:29500 can run
# programs as you (docs/security.md). Let a firewall admit the two machines alone.
set -euo pipefail
endpoint=${1:?"HOST:PORT of the first machine"}
name=${2:?"name of the run"}
shift 2

# Without it (torch 2.15) a machine that joins later waits in vain for the address of the others.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes="${NNODES:-1:2}" --nproc-per-node="${NPROC_PER_NODE:-gpu}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$name" \
    train_multi_GPU.py --resume auto --output-dir "runs/$name" "$@"
