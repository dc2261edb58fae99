#!/usr/bin/env bash
# Train with several processes on this machine, or on each of NNODES machines.
# Environment: NNODES NODE_RANK MASTER_ADDR PORT, PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need 2 'dist_train.sh CONFIG GPUS [options of train.py]' "$@"
launch "$2" "$REPO/tools/train.py" "$1" "${@:3}"
