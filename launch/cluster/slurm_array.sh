#!/usr/bin/env bash
#SBATCH --job-name=qipo
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue --open-mode=append
#
# Runs one line of a job list in each task of an array:
#   python -m launch.sweep --datasets=A,B --seeds=0,1,2 --root=/shared/sweep --jobs=jobs.txt
#   sbatch --array=1-$(wc -l < jobs.txt) launch/cluster/slurm_array.sh jobs.txt
set -uo pipefail

# A number and nothing else, because sed would run what stands beside it.
if [[ ! ${SLURM_ARRAY_TASK_ID:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "SLURM_ARRAY_TASK_ID=${SLURM_ARRAY_TASK_ID:-}: expected a line number of the job list" >&2
  exit 2
fi
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" -- "${1:?a job list}")
if [[ -z $command ]]; then
  echo "$1: no line $SLURM_ARRAY_TASK_ID" >&2
  exit 2
fi
# Slurm sends SIGTERM before the time limit and at preemption to what srun started: it saves and exits with 143.
srun bash -c "exec $command"
status=$?
if [[ $status == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
