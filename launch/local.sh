#!/usr/bin/env bash
# Several processes of one run on this machine.
#
#     launch/local.sh [--dry-run] [--devices=D | --gpus] [--port=P] [--logs=DIR] [--grace=5] N CONFIG.py [--key=value …]
#
# N processes with D fake CPU devices each (1), or with one GPU each. The output of process 0 is shown, that of all is
# kept in DIR. SIGTERM and Ctrl-C go to all of them once; they save, and end together. When one fails, the others get
# --grace seconds to say what they saw. The exit code is lmjax's own, of the process that says most about the reason.

set -um # with job control, so that a Ctrl-C at the terminal is not sent to the processes a second time
source "$(dirname -- "${BASH_SOURCE[0]}")/shared.sh"

devices=1 gpus='' port='' logs='' grace=5
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --devices=*) devices=${1#*=} && positive --devices "$devices" ;;
        --gpus) gpus=1 ;;
        --port=*) port=${1#*=} && positive --port "$port" ;;
        --grace=*) grace=${1#*=} && positive --grace "$grace" ;;
        --logs=?*) logs=${1#*=} ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; options stand before N, lmjax's own after CONFIG.py" ;;
        *) break ;;
    esac
    shift
done
positive N "${1:-}"
count=$1 && shift
config "$@"
[[ -f $1 ]] || fail "$1: there is no such file"
((devices == 1)) || [[ ! $gpus ]] || fail "--devices=$devices and --gpus: a process has one GPU, or CPU devices"

listening() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }
if [[ ! $port ]]; then # below those that the system hands out by itself
    until port=$((RANDOM % 10000 + 20000)) && ! listening "$port"; do :; done
fi

# process I CONFIG …: the command of one of them
process() {
    local own=("LMJAX_COORDINATOR=127.0.0.1:$port" "LMJAX_PROCESSES=$count" "LMJAX_PROCESS=$1")
    if [[ $gpus ]]; then
        own+=("CUDA_VISIBLE_DEVICES=$1")
    else
        own+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
    fi
    [[ ! $dry_run ]] || { run env "${own[@]}" lmjax train "${@:2}" && return; }
    exec env "${own[@]}" lmjax train "${@:2}"
}

if [[ $dry_run ]]; then
    for ((i = 0; i < count; i++)); do process "$i" "$@"; done
    exit 0
fi
command -v lmjax > /dev/null || fail "lmjax is not on the PATH: source .venv/bin/activate"
logs=${logs:-$(mktemp -d "${TMPDIR:-/tmp}/lmjax-XXXXXX")}
mkdir -p "$logs" || exit 2
say "$count processes, output in $logs/process-*.log"

# Functions, and one last line that calls them: bash reads a script while it runs, and may be given another one.
pids=() codes=() stopping='' stream=''

# shellcheck disable=SC2329  # the traps call it
pass_on() {
    local i
    stopping=1
    for i in "${!pids[@]}"; do [[ ${codes[i]} ]] || kill -s "$1" "${pids[i]}" 2> /dev/null; done
}

start() {
    local i out
    rm -f "$logs/stream" && mkfifo "$logs/stream" || exit 2
    tee -ia "$logs/process-0.log" < "$logs/stream" &
    stream=$!
    trap 'pass_on TERM' TERM
    trap 'pass_on INT' INT
    for ((i = 0; i < count; i++)); do
        [[ ! $stopping ]] || break
        out=$logs/process-$i.log
        ((i)) || out=$logs/stream
        (process "$i" "$@") >> "$out" 2>&1 < /dev/null & # in a process group of its own
        pids+=($!) codes+=('')
    done
}

# Bash's own words about signals and processes go nowhere; ours go to 3.
wait_for_all() {
    local i left=${#pids[@]} failed_at=''
    while ((left)); do
        sleep 0.2 &
        wait $! # in the background, or a Ctrl-C would be for sleep alone
        for i in "${!pids[@]}"; do
            if [[ ${codes[i]} ]] || kill -0 "${pids[i]}"; then continue; fi
            wait "${pids[i]}"
            codes[i]=$? left=$((left - 1))
            # 130 and 143 are what all end with that were told to stop, each when it has saved
            if [[ ! $stopping && ! $failed_at && ! ${codes[i]} =~ ^(0|130|143)$ ]]; then
                failed_at=$SECONDS
                ((left)) && say "process $i ended with ${codes[i]}; the others have $grace s" 2>&3
            fi
        done
        if [[ $failed_at ]] && ((left && SECONDS - failed_at >= grace)); then
            for i in "${!pids[@]}"; do # whole groups, with their helpers; what they end with says nothing
                [[ ${codes[i]} ]] || { kill -KILL -- "-${pids[i]}" && codes[i]=0 left=$((left - 1)); }
            done
        fi
    done
    for i in 1 2 3 4 5 6 7 8 9 10; do # the end of process 0's output, unless a helper of its still holds the pipe
        kill -0 "$stream" && sleep 0.1
    done
    kill "$stream"
    rm -f "$logs/stream"
}

# A typed error, a kill, a bug; then what those end with who only saw another one die.
end_with_the_code_that_says_most() {
    local told code
    for told in 7 5 4 3 2 6 other 1 134 8 143 130; do
        for code in "${codes[@]}"; do
            case $told in
                other) [[ " 7 5 4 3 2 6 1 134 8 143 130 0 " == *" $code "* ]] || exit "$code" ;;
                *) ((code != told)) || exit "$code" ;;
            esac
        done
    done
    ((${#pids[@]} == count)) || exit 143 # stopped before all were started
    exit 0
}

start "$@"; wait_for_all 3>&2 2> /dev/null; end_with_the_code_that_says_most
