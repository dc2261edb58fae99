#!/usr/bin/env bash
# Train through slurm.
# Environment: GPUS GPUS_PER_NODE CPUS_PER_TASK SRUN_ARGS, PYTHON. GPUS_PER_NODE=0 asks for none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need 4 'slurm_train.sh PARTITION JOB CONFIG WORK_DIR [options of train.py]' "$@"
slurm "$1" "$2" "$REPO/tools/train.py" "$3" --work-dir "$4" "${@:5}"
