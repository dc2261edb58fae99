#!/usr/bin/env bash
# Test through slurm.
# Environment: GPUS GPUS_PER_NODE CPUS_PER_TASK SRUN_ARGS, PYTHON. GPUS_PER_NODE=0 asks for none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need 4 'slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [options of test.py]' "$@"
slurm "$1" "$2" "$REPO/tools/test.py" "$3" "$4" "${@:5}"
