#!/usr/bin/env bash
# A TPU VM, or a slice of many hosts: created, given the code, trained on, watched and deleted, with gcloud.
#
#     launch/tpu.sh [--dry-run] [--zone=Z] [--project=P] [--version=V] [--slices=N] ACTION NAME …
#
#     create NAME TYPE [gcloud's flags]   a slice now: v4-32, v5litepod-16, v5p-64, v6e-256, …
#     queue  NAME TYPE [gcloud's flags]   one as soon as there is one; --spot is cheaper, and may be taken away
#     state  NAME                         of what was queued: WAITING_FOR_RESOURCES, …, ACTIVE, SUSPENDED
#     copy   NAME                         this code, as it lies here, to all hosts, installed with its [tpu] extra
#     exec   NAME COMMAND …               a command on all hosts, such as mounting the folder that runs are in
#     run    NAME CONFIG.py [--key=v …]   lmjax train on all hosts, in a restart loop that outlives your connection
#     logs   NAME                         of the first host, which writes for all, until Ctrl-C
#     stop   NAME                         lmjax saves and ends, and so does the loop
#     delete NAME, unqueue NAME           the slice, or what was queued with its slices
#
# JAX finds the hosts of a slice by itself. Several slices are one run: queue --slices=2 NAME makes NAME-0 and NAME-1,
# and the actions from copy to stop take NAME-0,NAME-1. Without --zone and --project, gcloud's own settings count.

set -u
source "$(dirname -- "${BASH_SOURCE[0]}")/shared.sh"

where=() version='' slices=1
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --zone=?* | --project=?*) where+=("$1") ;;
        --version=?*) version=${1#*=} ;;
        --slices=*) slices=${1#*=} && positive --slices "$slices" ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; options stand before the action, gcloud's flags after TYPE" ;;
        *) break ;;
    esac
    shift
done
action=${1:-} && shift
case $action in
    create | queue | state | copy | exec | run | logs | stop | delete | unqueue) ;;
    *) fail "'$action': give create, queue, state, copy, exec, run, logs, stop, delete or unqueue" ;;
esac
IFS=, read -ra names <<< "${1:-}"
((${#names[@]})) || fail "$action: the name of the TPU is missing"
for name in "${names[@]}"; do plain "the TPU's name" "$name"; done
name=$1 && shift
[[ $action =~ ^(copy|exec|run|logs|stop|delete)$ ]] || ((${#names[@]} == 1)) || fail "$action $name: give one name"
case $action in # what may follow the name
    create | queue) (($#)) || fail "$action $name: the type is missing, such as v5litepod-16" ;;
    exec) (($#)) || fail "exec $name: the command is missing" ;;
    run) config "$@" ;;
    *) ((!$#)) || fail "$action $name: '$1' is one too many" ;;
esac
((slices == 1)) || [[ $action == queue ]] || fail "--slices=$slices is for queue; elsewhere name them: $name-0,$name-1"
[[ ! $version || $action == create || $action == queue ]] || fail "--version=$version is for create and queue"

tpus=(gcloud compute tpus)
# on WORKER COMMAND: runs a text on one host, or all, of every slice
on() {
    local one
    for one in "${names[@]}"; do
        run "${tpus[@]}" tpu-vm ssh "$one" "${where[@]}" "--worker=$1" "--command=$2" || return
    done
}

# https://cloud.google.com/tpu/docs/runtimes
software() {
    [[ ! $version ]] || { echo "$version" && return; }
    case $1 in
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "'$1': not a type of v2 to v6e; give its software with --version=…" ;;
    esac
}

case $action in
    create)
        software=$(software "$1") || exit
        run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" "--accelerator-type=$1" "--version=$software" "${@:2}"
        ;;
    queue)
        software=$(software "$1") || exit
        nodes=("--node-id=$name")
        ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
        run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "${nodes[@]}" "--accelerator-type=$1" \
            "--runtime-version=$software" "${@:2}"
        ;;
    state) run "${tpus[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" ;;
    copy)
        pack || exit
        for one in "${names[@]}"; do
            run "${tpus[@]}" tpu-vm scp "$code" "$one:" "${where[@]}" --worker=all || exit
        done
        on all "$(install_there tpu)"
        ;;
    exec) on all "$*" ;;
    run) on all "$(train_there "${loop[@]}" "$@")" ;;
    logs)
        names=("${names[0]}")
        on 0 "$(follow_there)"
        ;;
    stop) on all "$(stop_there)" ;;
    delete) for name in "${names[@]}"; do run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" || exit; done ;;
    unqueue) run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force ;;
esac
