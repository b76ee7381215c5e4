#!/usr/bin/env bash
#SBATCH --job-name=drpo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=3-00:00:00
#SBATCH --output=drpo-%j.log
# One of the settings on Slurm, from the root of a checkout that every node sees, in the environment with verl and drpo:
#   sbatch --nodes=2 cluster/verl/slurm.sh qwen3-30b-a3b drpo [verl's own arguments]
set -euo pipefail
node="${SLURM_SUBMIT_DIR:-$PWD}/cluster/verl/node.sh"  # sbatch runs a copy of this file from elsewhere
if [[ ! -x "$node" ]]; then
    echo "slurm.sh: no $node; call sbatch from the root of the checkout" >&2
    exit 2
fi
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?call this file with sbatch}" | sed -n 1p)
HEAD=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | tr ' ' '\n' | grep -v : | sed -n 1p)
export HEAD NODES=$SLURM_NNODES
# Task 0 of a step is on the first node. A task that fails ends the others.
srun --cpu-bind=none --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID exec "$0" "$@"' "$node" "$@"
