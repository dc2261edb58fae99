#!/usr/bin/env bash
# Train both stages with several processes on this machine, or on each of NNODES machines.
# Environment: NNODES NODE_RANK MASTER_ADDR PORT, PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need 3 'dist_decoupled.sh STAGE1 STAGE2 GPUS [options of decoupled.py]' "$@"
launch "$3" "$REPO/tools/decoupled.py" "$1" "$2" "${@:4}"
