#!/usr/bin/env bash
# A comparison as a Slurm array, one run a task:
#   hesstrace compare --config sample_configs/compare_digits.yaml --out cmp --plan > plan.txt
#   sbatch --array=1-$(wc -l < plan.txt) sample_configs/slurm_compare.sh plan.txt
#   hesstrace compare --config sample_configs/compare_digits.yaml --out cmp
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
# Every planned command has --resume-or-start: a task that is requeued goes on where it stopped.
eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
