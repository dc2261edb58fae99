# Sourced by the dist_ and slurm_ scripts: REPO, PYTHON and PYTHONPATH. They work from any folder.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Every rank must find the package of this clone, also where it is not installed.
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

# An active environment goes first, then the one of this clone, then whatever PATH has.
if [ -n "${PYTHON:-}" ]; then
    :
elif [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    PYTHON=python
elif [ -x "$REPO/.venv/bin/python" ]; then
    PYTHON="$REPO/.venv/bin/python"
else
    PYTHON=$(command -v python || command -v python3 || true)
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

# need COUNT USAGE ARGS...: at least COUNT arguments.
need() {
    local count=$1 usage=$2
    shift 2
    [ $# -ge "$count" ] || fail "expected at least $count arguments, found $#; usage: $usage"
    [ -n "$PYTHON" ] || fail 'no python found: activate an environment, or set PYTHON'
}

# stages COUNT USAGE ARGS...: the words before the first option, at least COUNT, into LAST (the last
# of them) and STAGES (those before it), the options into OPTIONS.
stages() {
    local count=$1 usage=$2 words=()
    shift 2
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        words+=("$1")
        shift
    done
    need "$count" "$usage" ${words[@]+"${words[@]}"}
    STAGES=("${words[@]:0:${#words[@]}-1}")
    LAST=${words[${#words[@]} - 1]}
    OPTIONS=("$@")
}

# positive NAME VALUE: a whole number above 0.
positive() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 should be a whole number above 0, found '$2'"
}

# launch GPUS SCRIPT ARGS...: one process per GPU (per rank on a machine without GPUs).
launch() {
    local gpus=$1 nnodes=${NNODES:-1} port=${PORT:-}
    shift
    positive GPUS "$gpus"
    positive NNODES "$nnodes"
    if [ -z "$port" ]; then
        # Several machines must agree on the port, so only a single one may pick any free port.
        if [ "$nnodes" = 1 ]; then port=0; else port=29500; fi
    fi
    # torchrun and mmengine would set both to 1, with a page of warnings. A value that the user has
    # chosen is kept, and told to CPU runs, which otherwise share all cores among the ranks.
    export MMDET_LT_NUM_THREADS="${MMDET_LT_NUM_THREADS:-${OMP_NUM_THREADS:-}}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
    exec "$PYTHON" "$REPO/tools/torchrun.py" \
        --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" \
        "$@" --launcher pytorch
}

# slurm PARTITION JOB SCRIPT ARGS...: one task per GPU; GPUS_PER_NODE=0 runs GPUS tasks on CPUs.
slurm() {
    local partition=$1 job=$2 gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8} resources
    shift 2
    positive GPUS "$gpus"
    if [ "$per_node" = 0 ]; then
        resources=()
    else
        positive GPUS_PER_NODE "$per_node"
        if [ "$per_node" -gt "$gpus" ]; then per_node=$gpus; fi
        resources=(--gres="gpu:$per_node" --ntasks-per-node="$per_node")
    fi
    # SRUN_ARGS holds several words on purpose.
    # shellcheck disable=SC2086
    exec srun --partition="$partition" --job-name="$job" --ntasks="$gpus" \
        ${resources[@]+"${resources[@]}"} --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$PYTHON" -u "$@" --launcher slurm
}
