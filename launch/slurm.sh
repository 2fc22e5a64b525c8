#!/usr/bin/env bash
# Slurm: one process for each GPU, or for each node where --ntasks-per-node=1 (it then has all GPUs of its node).
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh CONFIG.py [--key=value …]
#     launch/slurm.sh --dry-run CONFIG.py …       prints what the job would run
#
# To be given from the folder of the code, whose .venv is used if it is there, on a disk that all nodes see. JAX finds
# the other processes by itself. Two minutes before the time limit, and when the job is preempted, lmjax saves; the
# same sbatch continues. For runs longer than the limit, give it several times with --dependency=singleton.
#
#SBATCH --job-name=lmjax
#SBATCH --output=lmjax-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -u
cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}" || exit 2 # sbatch runs a copy of this file, elsewhere
source launch/shared.sh

while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; Slurm's own stand before launch/slurm.sh, lmjax's after CONFIG.py" ;;
        *) break ;;
    esac
    shift
done
config "$@"
[[ $dry_run || ${SLURM_JOB_ID:-} ]] || fail "this is not a Slurm job: give sbatch launch/slurm.sh …, or --dry-run"
[[ ! -d .venv ]] || PATH=$PWD/.venv/bin:$PATH

# 8 is also what processes are told when another one of them dies. All GPUs of a node are shown to its processes: JAX
# gives each its own, and they exchange data without leaving the node.
run launch/restart.sh "--few=1,8,139" "--stop=143" srun --wait=60 --gpu-bind=none lmjax train "$@"
code=$?
if ((code == 143)); then # a job that ends by itself while it is being preempted is not given back to the queue
    say "saved; waiting for Slurm to end the job"
    sleep 600
fi
exit "$code"
