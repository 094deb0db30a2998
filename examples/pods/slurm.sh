#!/bin/bash
# Trains on several nodes: sbatch examples/pods/slurm.sh --dataset mnist --data-dir ~/tfds
#
# One process per GPU. SLURM tells each which it is, and JAX reads that.
#SBATCH --job-name=capsjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# Two minutes before the time limit, and when the job is preempted: training saves and ends.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

run=${RUN:-runs/$SLURM_JOB_NAME}
srun capsjax train --run-dir "$run" --auto-resume --start-timeout 300 "$@"
code=$?

# A run that is over has a result.json. Code 2 stands for options or data that another try would
# not change.
if [ ! -e "$run/result.json" ] && [ "$code" != 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
