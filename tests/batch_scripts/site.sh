#!/bin/bash

# Parameters
#SBATCH --account=writing
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --gres=gpu:h100:8
#SBATCH --job-name=lwz-out-0a1b2c3d-1
#SBATCH --mem=512G
#SBATCH --no-requeue
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/lwz/runs/jobs/out-0a1b2c3d/1/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --signal=B:USR2@2400
#SBATCH --time=2880

# setup
module purge
module load cuda/13.0
module load nccl
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export HF_HOME='/shared/the cache/huggingface'
export LWZ_CACHE='/shared/the cache/lwz'
export VLLM_CACHE_ROOT='/shared/the cache/vllm'
export TRITON_CACHE_DIR='/shared/the cache/triton'
export TORCHINDUCTOR_CACHE_DIR='/shared/the cache/inductor'
export HF_HUB_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export NCCL_SOCKET_IFNAME=ib0
export TMPDIR=/scratch/lwz-$SLURM_JOB_ID
srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap mkdir -p "$TMPDIR"
ulimit -n 65536

# command
export SUBMITIT_EXECUTOR=slurm
exec /shared/lwz/.venv/bin/python -u -m lwzlib.cluster.in_job /shared/lwz/runs/jobs/out-0a1b2c3d/1
