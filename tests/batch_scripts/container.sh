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
export HF_HOME=/shared/cache/huggingface
export LWZ_CACHE=/shared/cache/lwz
export VLLM_CACHE_ROOT=/shared/cache/vllm
export TRITON_CACHE_DIR=/shared/cache/triton
export TORCHINDUCTOR_CACHE_DIR=/shared/cache/inductor
export HF_HUB_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export LWZ_CONTAINER='apptainer exec --nv --bind /shared,/scratch,/etc/slurm,/run/munge,/usr/bin/srun,/usr/bin/scontrol,/usr/lib64/slurm /shared/images/longwriter-zero.sif'
export TMPDIR=/scratch/lwz-$SLURM_JOB_ID
srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap mkdir -p "$TMPDIR"

# command
export SUBMITIT_EXECUTOR=slurm
exec apptainer exec --nv --bind /shared,/scratch,/etc/slurm,/run/munge,/usr/bin/srun,/usr/bin/scontrol,/usr/lib64/slurm /shared/images/longwriter-zero.sif /opt/lwz/bin/python -u -m lwzlib.cluster.in_job /shared/lwz/runs/jobs/out-0a1b2c3d/1
