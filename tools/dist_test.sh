#!/usr/bin/env bash
# Test with several processes on this machine, or on each of NNODES machines.
# Environment: NNODES NODE_RANK MASTER_ADDR PORT, PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need 3 'dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]' "$@"
launch "$3" "$REPO/tools/test.py" "$1" "$2" "${@:4}"
