#!/usr/bin/env bash
# Train a recipe of several stages with several processes on this machine, or on each of NNODES.
# Environment: NNODES NODE_RANK MASTER_ADDR PORT, PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stages 3 'dist_train_stages.sh STAGE1 STAGE2 [STAGE3 ...] GPUS [options of train_stages.py]' "$@"
launch "$LAST" "$REPO/tools/train_stages.py" "${STAGES[@]}" ${OPTIONS[@]+"${OPTIONS[@]}"}
