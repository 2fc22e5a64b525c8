#!/usr/bin/env bash
# GPU hosts that you reach with ssh: one process each, with all of its GPUs.
#
#     launch/gpu.sh [--dry-run] [--port=8476] [--coordinator=ADDRESS] ACTION HOST[,HOST …] …
#
#     copy HOSTS                         this code, as it lies here, to all hosts, installed with its [cuda] extra
#     exec HOSTS COMMAND …               a command on all hosts
#     run  HOSTS CONFIG.py [--key=v …]   lmjax train on all hosts, in a restart loop that outlives your connection
#     logs HOSTS                         of the first host, which writes for all, until Ctrl-C
#     stop HOSTS                         lmjax saves and ends, and so does the loop
#
# The first host is process 0. The others must reach --port on it, under --coordinator (its name in HOSTS, without
# USER@); give the address of the interface that they share if it has several.

set -u
source "$(dirname -- "${BASH_SOURCE[0]}")/shared.sh"

port=8476 coordinator=''
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --port=*) port=${1#*=} && positive --port "$port" ;;
        --coordinator=*) coordinator=${1#*=} ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; options stand before the action, lmjax's own after CONFIG.py" ;;
        *) break ;;
    esac
    shift
done
action=${1:-} && shift
[[ $action =~ ^(copy|exec|run|logs|stop)$ ]] || fail "'$action': give copy, exec, run, logs or stop"
IFS=, read -ra hosts <<< "${1:-}"
((${#hosts[@]})) || fail "$action: the hosts are missing, such as a.lan,b.lan"
for host in "${hosts[@]}"; do plain "a host" "$host"; done
shift
case $action in # what may follow the hosts
    exec) (($#)) || fail "exec: the command is missing" ;;
    run) config "$@" ;;
    *) ((!$#)) || fail "$action: '$1' is one too many" ;;
esac
coordinator=${coordinator:-${hosts[0]#*@}}
plain --coordinator "$coordinator"

# on HOST COMMAND: runs a text there
on() { run ssh -o BatchMode=yes "$1" "$2"; }
on_all() { for host in "${hosts[@]}"; do on "$host" "$1" || return; done; }

case $action in
    copy)
        pack || exit
        for host in "${hosts[@]}"; do run scp -q -o BatchMode=yes "$code" "$host:" || exit; done
        on_all "$(install_there cuda)"
        ;;
    exec) on_all "$*" ;;
    run)
        for i in "${!hosts[@]}"; do
            own=("LMJAX_COORDINATOR=$coordinator:$port" "LMJAX_PROCESSES=${#hosts[@]}" "LMJAX_PROCESS=$i")
            on "${hosts[i]}" "$(train_there "${own[@]}" "${loop[@]}" "$@")" || exit
        done
        ;;
    logs) on "${hosts[0]}" "$(follow_there)" ;;
    stop) on_all "$(stop_there)" ;;
esac
