#!/usr/bin/env bash
# groupconv optimize on the nodes of a SLURM job, all arguments its own:
#
#   sbatch --nodes 2 --gpus-per-node 4 examples/slurm_optimize.sh \
#       --model net.py:build --data photos/ --budget 2x --recover 1h --out runs/net
#
# The output folder must be one that all nodes see. A job that is preempted goes on where it was.
#SBATCH --job-name=groupconv
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

# One process for each GPU, or as many as are asked for.
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / processes))
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$processes" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:${RENDEZVOUS_PORT:-29500}" \
    -m groupconv optimize "$@"
