#!/usr/bin/env bash
# GKE: a JobSet, written as XPK writes them, so that its clusters take it and its commands see it.
#
#     launch/gke.sh [--dry-run] OPTIONS run NAME CONFIG.py [--key=value …]
#     launch/gke.sh [--dry-run] logs NAME | state NAME | delete NAME
#
#     --tpu=tpu-v6e-slice --topology=4x4 [--slices=1] [--chips=4]    slices; chips of one node
#     --gpu=nvidia-h100-80gb [--nodes=1] [--gpus=8]                  nodes; GPUs of one node
#     --image=IMAGE          with lmjax installed and your config in its working directory
#     --claim=CLAIM          a PersistentVolumeClaim that all nodes can write; runs lie there
#     --queue=QUEUE          of Kueue (multislice-queue, XPK's)
#     --priority=CLASS       XPK's clusters have very-low to very-high
#     --restarts=50          of the whole JobSet; not at codes that nobody but you can mend
#
# TPUs: JAX reads what GKE tells the pods. GPUs: JAX cannot see a JobSet, so the manifest says who is who.

set -u
source "$(dirname -- "${BASH_SOURCE[0]}")/shared.sh"

tpu='' gpu='' topology='' slices='' chips='' nodes='' gpus='' image='' claim='' priority=''
queue=multislice-queue restarts=50 given=''
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --tpu=?* | --gpu=?* | --topology=?* | --image=?* | --claim=?* | --queue=?* | --priority=?*)
            given=${1%%=*}
            printf -v "${given#--}" %s "${1#*=}"
            ;;
        --slices=* | --chips=* | --nodes=* | --gpus=* | --restarts=*)
            given=${1%%=*}
            positive "$given" "${1#*=}"
            printf -v "${given#--}" %s "${1#*=}"
            ;;
        --help | -h) usage ;;
        -*) fail "$1: no such option; options stand before the action, lmjax's own after CONFIG.py" ;;
        *) break ;;
    esac
    shift
done
action=${1:-} name=${2:-}
[[ $action =~ ^(run|logs|state|delete)$ ]] || fail "'$action': give run, logs, state or delete"
# The pods' names are made of it, and no name in a cluster may be longer than 63.
[[ $name =~ ^[a-z]([a-z0-9-]{0,37}[a-z0-9])?$ ]] || fail "NAME '$name': give up to 39 of a-z, 0-9 and -, a letter first"
shift 2

first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
if [[ $action != run ]]; then
    ((!$#)) || fail "$action $name: '$1' is one too many"
    [[ ! $given ]] || fail "$given is for run"
    case $action in
        logs) run kubectl logs --follow --tail=100 "--selector=$first" ;;
        state) run kubectl get "jobset/$name" ;;
        delete) run kubectl delete "jobset/$name" ;;
    esac
    exit
fi

# ---- What cannot be right --------------------------------------------------------------------------------------------
config "$@"
for word; do [[ $word != *[[:cntrl:]]* ]] || fail "${word@Q}: line breaks cannot stand in a manifest"; done
for word in "$tpu" "$gpu" "$claim" "$queue" "$priority"; do [[ ! $word ]] || plain "the value" "$word"; done
[[ $image && $claim ]] || fail "run needs --image=… and --claim=…"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || fail "--image=$image: not the name of an image"
[[ $tpu || $gpu ]] || fail "run needs --tpu=… with --topology=…, or --gpu=…"
[[ ! $tpu || ! $gpu ]] || fail "--tpu=$tpu and --gpu=$gpu: a run has one kind of device"
if [[ $tpu ]]; then
    [[ ! $nodes$gpus ]] || fail "--nodes and --gpus are for --gpu; the topology says how many nodes a slice has"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology: give one such as 4x4 or 2x2x4"
    all=$((${topology//x/*}))
    chips=${chips:-$((all < 4 ? all : 4))}
    ((all % chips == 0)) || fail "--topology=$topology has $all chips, which --chips=$chips does not divide"
    nodes=$((all / chips)) replicas=${slices:-1} container=jax-tpu resource="google.com/tpu: $chips"
else
    [[ ! $topology$slices$chips ]] || fail "--topology, --slices and --chips are for --tpu"
    nodes=${nodes:-1} replicas=1 container=gpu-image resource="nvidia.com/gpu: ${gpus:-8}"
fi

# ---- The manifest ----------------------------------------------------------------------------------------------------
# Words -> a list of strings, in which Kubernetes expands nothing.
strings() {
    local word line=
    for word; do
        word=${word//\\/\\\\} word=${word//\"/\\\"}
        line+=", \"${word//\$(/\$\$(}\""
    done
    echo "[${line#, }]"
}

# if_set TEXT LINES: the lines, where the text is not empty
if_set() { [[ ! $1 ]] || printf '%s\n' "$2"; }

manifest() {
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels:
    kueue.x-k8s.io/queue-name: $queue
    xpk.google.com/workload: $name
END
    if_set "$tpu" "  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a node pool is a slice"
    cat <<END
spec:
  ttlSecondsAfterFinished: 43200
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: notToBeMended
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice-job
      replicas: $replicas
      template:
        spec:
          parallelism: $nodes
          completions: $nodes
          completionMode: Indexed
          backoffLimit: 0  # one pod fails, all are started again
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: []
                onExitCodes:
                  containerName: $container
                  operator: In
                  values: [2, 3, 4, 5, 7]  # docs/reliability.md
          template:
            metadata:
              labels:
                xpk.google.com/workload: $name
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 120
END
    if_set "$priority" "              priorityClassName: $priority"
    if_set "$tpu" "              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $tpu
                cloud.google.com/gke-tpu-topology: $topology"
    if_set "$gpu" "              nodeSelector:
                cloud.google.com/gke-accelerator: $gpu"
    cat <<END
              tolerations:
                - key: ${resource%:*}
                  operator: Exists
              containers:
                - name: $container
                  image: $image
                  command: $(strings lmjax train "$@" --run_root=/runs)
END
    if_set "$tpu" "                  securityContext:
                    privileged: true"
    if_set "$gpu" "                  env:
                    - name: LMJAX_COORDINATOR
                      value: $name-slice-job-0-0.$name:8476
                    - name: LMJAX_PROCESSES
                      value: \"$nodes\"
                    - name: LMJAX_PROCESS
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
    cat <<END
                  resources:
                    limits:
                      $resource
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $claim
                - name: shared-memory
                  emptyDir:
                    medium: Memory
END
}

if [[ $dry_run ]]; then
    manifest "$@"
    echo "# kubectl apply --filename=-  (of the above)"
else
    manifest "$@" | kubectl apply --filename=-
fi
