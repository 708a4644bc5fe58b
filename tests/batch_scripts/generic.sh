#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --job-name=lwz-out-0a1b2c3d-1
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/lwz/runs/jobs/out-0a1b2c3d/1/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=B:USR2@2400
#SBATCH --time=1440

# setup
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# command
export SUBMITIT_EXECUTOR=slurm
exec /shared/lwz/.venv/bin/python -u -m lwzlib.cluster.in_job /shared/lwz/runs/jobs/out-0a1b2c3d/1
