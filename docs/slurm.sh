#!/bin/bash
# Two machines with four GPUs each: sbatch docs/slurm.sh train_rdd.py --flagfile ./config/CIFAR10_RDD.txt
# At a time limit or on preemption, SLURM sends SIGTERM and the run ends with a checkpoint after its step.
# Submit the same job again to resume.
#SBATCH --job-name=rdd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=4 --max_restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first:29400" "$@"
