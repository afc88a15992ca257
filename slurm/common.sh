# shellcheck shell=bash
# Sourced by the batch scripts beside it: how ranks are started, and what follows from the way they end.
#
# What belongs to a site stays outside. sbatch's flags, or its SBATCH_* variables, choose partition, account, nodes and
# time. Of the environment this file reads: PYTHON (the interpreter), MEGAGPT_HOME (the repository, when it is not the
# folder sbatch was called in), MEGAGPT_EXPORT (names of more variables for the ranks, as in "WANDB_API_KEY HF_HOME"),
# MEGAGPT_EXCLUDE=1 (go on without the hosts that --preflight found slow or failing) and MEGAGPT_UMASK.
set -euo pipefail
umask "${MEGAGPT_UMASK:-077}"

export MEGAGPT_HOME=${MEGAGPT_HOME:-$SLURM_SUBMIT_DIR}
python=${PYTHON:-python}
inside=()     # what a command is started by inside the allocation: a container's exec
srun_flags=() # more flags of srun
warm=(true)   # what fills the caches of compiled kernels on a node with GPUs
fruitless_limit=3

# The ranks meet on the first node, under the address by which Slurm knows it: its name need not be in any DNS.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol --oneliner show node "${nodes[0]}" | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p')
address=${address:-${nodes[0]}}
export MASTER_ADDR=${MASTER_ADDR:-$address}
# This script runs there as well, and can see whether their port is free: another program's would end the job for good.
listens() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
port=$((20000 + SLURM_JOB_ID % 10000))
while listens 127.0.0.1 "$port" || listens "$address" "$port"; do port=$((20000 + (port + 3001) % 10000)); done
export MASTER_PORT=${MASTER_PORT:-$port}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take sbatch's --cpus-per-task by itself
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Compiled kernels go to each node's own disk: on NFS they are lost, locked or stale. Nobody else can know the name.
cache=$(mktemp --dry-run "${TMPDIR:-/tmp}/megagpt-$SLURM_JOB_ID-XXXXXXXXXX")
export MEGAGPT_WARM_RANKS=${SLURM_NTASKS:-1}
export TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/torch_extensions

# Ranks get these variables and Slurm's own, and nothing else that the submitting shell happened to have.
export_list() {
    local names=(PATH HOME USER LOGNAME SHELL LANG TZ TMPDIR LD_LIBRARY_PATH VIRTUAL_ENV CONDA_PREFIX CUDA_HOME
        DS_ACCELERATOR MASTER_ADDR MASTER_PORT TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR TOKENIZERS_PARALLELISM
        PYTHONUNBUFFERED PYTHONFAULTHANDLER "${!LC_@}" "${!OMP_@}" "${!NCCL_@}" "${!TORCH_NCCL_@}" "${!GLOO_@}"
        "${!UCX_@}" "${!FI_@}" "${!MEGAGPT_@}") more IFS=' '
    read -ra more <<<"${MEGAGPT_EXPORT:-}"
    IFS=,
    printf '%s' "${names[*]}${more:+,${more[*]}}"
}

# value_of VARIABLE FLAG "$@": the value that the arguments give to a flag, however it is spelt.
value_of() {
    local -n found=$1
    local flag=$2 name
    found=
    shift 2
    while (($#)); do
        name=${1%%=*}
        if [[ ${name//-/_} == __$flag ]]; then
            if [[ $1 == *=* ]]; then found=${1#*=}; else found=${2-}; fi
        fi
        shift
    done
}

# once_a_node COMMAND...: one task on every node.
once_a_node() {
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export="$(export_list)" "${srun_flags[@]}" "$@"
}

# Makes the folders of the caches, removes those that killed jobs left, and fills the caches where there is a GPU.
prepare_nodes() {
    # shellcheck disable=SC2016 # expanded on each node
    once_a_node bash -c 'set -e
        mkdir -m 700 -- "$1" 2>/dev/null || [ -O "$1" ] # nodes may share a disk
        shift
        mkdir -p -- "$TRITON_CACHE_DIR" "$TORCH_EXTENSIONS_DIR"
        find "${TMPDIR:-/tmp}" -maxdepth 1 -type d -user "$(id -u)" -name "megagpt-[0-9]*-??????????" \
            -mtime +30 -exec rm -rf {} + || true
        if nvidia-smi -L >/dev/null 2>&1; then "$@" || true; fi' prepare "$cache" "${inside[@]}" "${warm[@]}"
}

# run COMMAND...: one task a rank; then this script ends, and the job with it or not.
run() {
    local run_dir code
    value_of run_dir run_dir "$@"
    if [[ ! $run_dir ]]; then
        echo "error: a run needs --run_dir, the folder of the run" >&2
        exit 2
    fi
    if [[ $run_dir != /* ]]; then run_dir=$PWD/$run_dir; fi
    state=$run_dir/slurm/$SLURM_JOB_ID
    mkdir -p -- "$state"
    rm -f -- "$state/code" "$state/exclude"
    touch -- "$state/started"
    export MEGAGPT_EXIT_FILE=$state/code MEGAGPT_EXCLUDE_FILE=$state/exclude
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${nodes[*]}"

    pid= cancelled= early=
    # srun hands it on to every rank, unless it has ended: then this script is about to do what is right.
    trap 'early=1; if [[ $pid ]]; then kill -USR1 "$pid" 2>/dev/null || true; fi' USR1
    trap 'cancelled=1' TERM # the ranks have it from Slurm, and save
    prepare_nodes
    if [[ $early || $cancelled ]]; then settle 75; fi
    # A group of its own, or srun would get TERM with this shell where Slurm signals groups, and kill the ranks at once.
    # --kill-on-bad-exit: without it the ranks that are left wait in a collective until the time limit.
    setsid srun --kill-on-bad-exit=1 --wait=60 --export="$(export_list)" "${srun_flags[@]}" \
        "${inside[@]}" "$@" &
    pid=$!
    if [[ $early ]]; then kill -USR1 "$pid" || true; fi # it came between the two looks
    code=129
    while ((code > 128)) && kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait`, and not what it waits for
        wait "$pid" && code=0 || code=$?
    done
    wait "$pid" && code=0 || code=$?
    settle "$code"
}

# settle CODE: requeue what can go on, and end. srun tells the highest code of all ranks; the first to fail wrote its own.
settle() {
    local code=$1
    if [[ -s $state/code ]]; then code=$(<"$state/code"); fi
    if [[ ! $cancelled ]]; then once_a_node rm -rf -- "$cache" || true; fi
    case $code in
        4 | 137) # a rank that fails by itself leaves its own code before its peers miss it
            echo "a rank has ended without a word, or never came (code $code): it was killed, most often for want of" \
                "memory, or its node is gone; sacct -j $SLURM_JOB_ID --format=JobID,State,ExitCode,MaxRSS says more" >&2
            ;;
    esac
    case $code in
        0 | 1 | 2 | 3 | 6 | 7) exit "$code" ;; # done, or another start would end the same way
    esac
    if [[ -e $state/../../stop ]]; then exit "$code"; fi # the file by which a user stops a run
    if [[ $cancelled ]]; then
        echo "job $SLURM_JOB_ID was told to end (code $code): whoever did so decides whether it starts again"
        exit "$code"
    fi
    count_fruitless
    if ((fruitless >= fruitless_limit)); then
        echo "job $SLURM_JOB_ID stops (code $code): $fruitless starts in a row have left no new checkpoint" >&2
        exit "$code"
    fi
    echo "job $SLURM_JOB_ID goes back into the queue (code $code)"
    trap '' TERM # requeue sends one
    scontrol requeue "$SLURM_JOB_ID" || true # after the failure of a node Slurm has done so itself
    if [[ ${MEGAGPT_EXCLUDE:-} && -s $state/exclude ]]; then
        exclude=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -nE 's/.* ExcNodeList=([^ (]+).*/\1,/p') || true
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$exclude$(paste -sd, -- "$state/exclude")" || true
    fi
    # Slurm lets a requeued job wait for two minutes; versions that set that time later than now ignore this.
    scontrol update JobId="$SLURM_JOB_ID" StartTime=now || true
    exit "$code"
}

# fruitless: how many starts in a row, with this one, have committed no checkpoint.
count_fruitless() {
    fruitless=$(cat -- "$state/fruitless" 2>/dev/null || echo 0)
    if [[ $(find "$state/../.." -name manifest.json -newer "$state/started" -print -quit) ]]; then
        fruitless=0
    else
        fruitless=$((fruitless + 1))
    fi
    echo "$fruitless" >"$state/fruitless"
}
