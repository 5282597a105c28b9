#!/bin/bash
# Starts one process per device with MindSpore's msrun. Arguments as in MindFormers' script of the same name; `usage`
# below shows them. Differences: with one or two arguments it stays until the job ends, its exit status is the job's,
# and after a failure it shows the end of the failing worker's log.

usage() {
    cat <<'TEXT'
usage, one machine:
  bash scripts/msrun_launcher.sh "run_mindformer.py OPTIONS" [WORKER_NUM]
  bash scripts/msrun_launcher.sh "run_mindformer.py OPTIONS" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
usage, several machines (run it on each, with its own NODE_RANK):
  bash scripts/msrun_launcher.sh "run_mindformer.py OPTIONS" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT \
      NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT

  WORKER_NUM        processes in all, one per device. Default 8
  LOCAL_WORKER      processes on this machine
  MASTER_ADDR       address of the machine with NODE_RANK 0. Default 127.0.0.1
  MASTER_PORT       a free port of that machine. Default 8118
  LOG_DIR           folder of worker_N.log and scheduler.log. Default output/msrun_log
  JOIN              True: stay until the job ends (default); False: leave it in the background
  CLUSTER_TIME_OUT  seconds to wait for the other processes at the start. Default 7200

Where the current folder has no run_mindformer.py, that of mindformers_glm32k runs.
Environment: MF_LOG_SUFFIX is appended to the log folders' names; PLOG_REDIRECT_TO_OUTPUT=True puts Ascend's own logs
into output/plog.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

whole_number() {  # NAME VALUE LEAST MOST
    [[ $2 =~ ^[0-9]{1,9}$ ]] && (($2 >= $3 && $2 <= $4)) || fail "$1 is '$2', a whole number from $3 to $4 is needed"
}

case ${1:-} in
    -h | --help) usage; exit 0 ;;
esac

worker_num=8 local_worker="" master_addr=127.0.0.1 master_port=8118 node_rank=0
log_dir=output/msrun_log join=True time_out=7200
case $# in
    1) ;;
    2) worker_num=$2 ;;
    6) worker_num=$2 master_port=$3 log_dir=$4 join=$5 time_out=$6 ;;
    9) worker_num=$2 local_worker=$3 master_addr=$4 master_port=$5 node_rank=$6 log_dir=$7 join=$8 time_out=$9 ;;
    *) usage >&2; fail "1, 2, 6 or 9 arguments are needed, got $#" ;;
esac
local_worker=${local_worker:-$worker_num}
join=${join^}
whole_number WORKER_NUM "$worker_num" 1 1000000
whole_number LOCAL_WORKER "$local_worker" 1 "$worker_num"
whole_number MASTER_PORT "$master_port" 1024 65535
whole_number NODE_RANK "$node_rank" 0 $((worker_num - 1))
whole_number CLUSTER_TIME_OUT "$time_out" 1 999999999
[[ $join == True || $join == False ]] || fail "JOIN is '$join', True or False is needed"
[[ -n $log_dir && -n $master_addr ]] || fail "LOG_DIR and MASTER_ADDR must not be empty"

# the words of the first argument, quotes inside it respected
eval "order=($1)" 2>/dev/null || fail "cannot be split into words (quotes that do not match?): $1"
[[ ${order[0]:-} == python || ${order[0]:-} == python3 ]] && order=("${order[@]:1}")
[[ ${#order[@]} -gt 0 ]] || fail "the first argument is empty; give \"run_mindformer.py --config …\""

python=$(command -v python || command -v python3) || fail "no python on PATH; activate the virtual environment first"
command -v msrun > /dev/null || fail "no msrun on PATH (it comes with mindspore); activate the virtual environment first"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ ! -f ${order[0]} ]]; then
    [[ ${order[0]##*/} == run_mindformer.py || ${order[0]} == run_mindformer ]] ||
        fail "${order[0]}: no such file (seen from $PWD)"
    # find_spec of the package looks it up without importing it
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("mindformers_glm32k") is None)' ||
        fail "no run_mindformer.py in $PWD, and $python does not find mindformers_glm32k; pip install -e $root"
    order=(-m mindformers_glm32k.run_mindformer "${order[@]:1}")
fi

suffix=${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
log_dir=$log_dir$suffix
export LOG_MF_PATH=${LOG_MF_PATH:-$PWD/output/log$suffix}
if [[ ${PLOG_REDIRECT_TO_OUTPUT:-False} != False ]]; then
    export ASCEND_PROCESS_LOG_PATH=$PWD/output/plog$suffix
fi

if ((worker_num == 1)); then
    echo "one process: python runs it without msrun"
    exec "$python" "${order[@]}"
fi

if ((node_rank == 0)) && (exec 3<> "/dev/tcp/127.0.0.1/$master_port") 2> /dev/null; then
    fail "MASTER_PORT $master_port is taken on this machine by another program or job; choose another one"
fi

command=(msrun "--worker_num=$worker_num" "--local_worker_num=$local_worker" "--master_addr=$master_addr"
    "--master_port=$master_port" "--log_dir=$log_dir" "--join=$join" "--cluster_time_out=$time_out")
((local_worker < worker_num)) && command+=("--node_rank=$node_rank")
# of many workers only the first and the last (in a pipeline the last stage, which has the loss) go to the terminal
first=$((local_worker < worker_num ? node_rank * local_worker : 0))
((local_worker > 2)) && command+=("--tail_worker_log=$first,$((first + local_worker - 1))")
# on Ascend machines each process gets the cores next to its device; on CPU it would only narrow the processes
command -v npu-smi > /dev/null && command+=("--bind_core=True")
command+=("${python##*/}" "${order[@]}")

mkdir -p "$log_dir" || fail "cannot make the folder $log_dir"
stamp=$(mktemp) || exit 1
trap 'rm -f "$stamp" "$stamp.errors" "$stamp.ranks"' EXIT
printf 'running:'; printf ' %q' "${command[@]}"; echo
echo "logs: $(cd "$log_dir" && pwd)"

# process, rank and role of each child of msrun, one a line
children() {
    local pid
    for pid in $(cat "/proc/$msrun/task/$msrun/children" 2> /dev/null); do
        tr '\0' '\n' 2> /dev/null < "/proc/$pid/environ" |
            awk -F = -v pid="$pid" '$1 == "MS_ROLE" {role = $2} $1 == "RANK_ID" {rank = $2} END {print pid, rank, role}'
    done
}

# The first signal goes to the workers, which finish a step and save; the second ends the job. msrun ends with status 0
# when it is interrupted, and it is the one that can stop the workers.
stop() {  # SIGNAL EXIT_STATUS
    local again=0 pids
    trap 'again=1' INT TERM
    pids=$(children | awk '$3 == "MS_WORKER" {print $1}')
    if [[ -n $pids ]]; then
        echo "SIG$1: the workers finish a step and save; a second signal ends them at once" >&2
        kill "-$1" $pids 2> /dev/null
        while ((!again)) && kill -0 "$msrun" 2> /dev/null; do sleep 0.5; done
    fi
    trap '' INT TERM
    while kill -INT "$msrun" 2> /dev/null; do sleep 1; done
    echo "stopped; checkpoints saved so far are kept" >&2
    exit "$2"
}
# in a session of its own: Ctrl-C is for this script alone
setsid "${command[@]}" < /dev/null 2> >(tee "$stamp.errors" >&2) &
msrun=$!
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
(   # which process is which worker, asked while they live
    for ((seconds = 0; seconds < 120; seconds++)); do
        found=$(children)
        [[ $(grep -c MS_WORKER <<< "$found") -ge $local_worker ]] && break
        kill -0 "$msrun" 2> /dev/null || break
        sleep 1
    done
    echo "$found" > "$stamp.ranks"
) &
wait "$msrun"
status=$?
trap - INT TERM

# What msrun says of the worker that ended first: "rank 1 (process 123) ended with status -9"
first_to_end() {
    local pid code rank
    read -r pid code < <(sed -nE 's/.*Worker process ([0-9]+) exit with exception. Error code: (-?[0-9]+).*/\1 \2/p' \
        "$stamp.errors" 2> /dev/null | head -n 1)
    [[ -n $pid ]] || return 1
    rank=$(awk -v pid="$pid" '$1 == pid {print $2}' "$stamp.ranks" 2> /dev/null)
    echo "worker ${rank:-of unknown rank} (process $pid) ended first, $([[ $code == -* ]] && echo "killed by signal ${code#-}" || echo "with status $code")"
}

# The worker that failed: the one whose log has an error and was written first; the others were killed a second later.
failing_log() {
    local logs log
    mapfile -t logs < <(find "$log_dir" -maxdepth 1 -name 'worker_*.log' -newer "$stamp" -printf '%T@ %p\n' |
        sort -n | cut -d ' ' -f 2-)
    for log in "${logs[@]}"; do
        if grep -qE '^error: |Traceback \(most recent call last\)|: error: |\[(ERROR|CRITICAL)\]' "$log"; then
            echo "$log"
            return
        fi
    done
    return 1
}

if ((status != 0)); then
    if log=$(failing_log); then
        echo "===== the job failed; the end of $log =====" >&2
        grep -v '^\[INFO\] ' "$log" | tail -n 25 >&2  # mindspore's own notes come after the error
    else
        echo "no error in the workers' logs: a worker was killed from outside (out of memory?)" >&2
    fi
    first_to_end >&2
    echo "error: the job ended with status $status; all logs are in $log_dir" >&2
elif [[ $join == False ]]; then
    echo "the job goes on in the background; look at it with: tail -f $log_dir/worker_$first.log"
fi
exit "$status"
