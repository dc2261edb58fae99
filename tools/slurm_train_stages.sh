#!/usr/bin/env bash
# Train a recipe of several stages through slurm.
# Environment: GPUS GPUS_PER_NODE CPUS_PER_TASK SRUN_ARGS, PYTHON. GPUS_PER_NODE=0 asks for none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage='slurm_train_stages.sh PARTITION JOB STAGE1 STAGE2 [STAGE3 ...] WORK_DIR'
stages 5 "$usage [options of train_stages.py]" "$@"
slurm "${STAGES[0]}" "${STAGES[1]}" "$REPO/tools/train_stages.py" "${STAGES[@]:2}" \
    --work-dir "$LAST" ${OPTIONS[@]+"${OPTIONS[@]}"}
