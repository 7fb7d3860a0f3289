#!/usr/bin/env bash
# Train on Slurm and go on after preemption, the time limit and lost nodes.
#
#     sbatch launch/slurm.sh --config configs/u2net_full.yaml --data-path /data/DUTS
#
# Edit the resources below: one task is one training process with its GPU. Slurm sends SIGUSR1 to
# the tasks two minutes before the time limit, and SIGTERM when it preempts the job: the run saves
# after the present step, status.json says "stopped", and the job queues again under its number, by
# which it finds its run folder. All tasks of a node see its GPUs, and each takes its own: with
# --gpus-per-task they could not reach each other's memory, and gradients would go by way of the host.
#
# Trusted networks only: whoever reaches the tasks' ports can stop or spoil the run
# (docs/security.md).
#SBATCH --job-name=pixtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

# sbatch runs a copy of this file: the repository is where it was called.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
run=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID

# Since Slurm 22.05 srun does not take this over from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# How the last start ended: an error before this one has a status of its own must not queue again.
before=$(cat "$run/status.json" 2>/dev/null)

# A task that dies takes the others along at once, instead of leaving them waiting for it.
srun --kill-on-bad-exit=1 \
    python train_multi_GPU.py --resume auto --output-dir "$run" "$@"
code=$?

after=$(cat "$run/status.json" 2>/dev/null)
if [ $code -ne 0 ] && [ "$after" != "$before" ] && [[ $after == *'"state": "stopped"'* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
