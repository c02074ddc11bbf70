#!/usr/bin/env bash
# Runs `lwd train` on TPU slices of a GKE cluster, as a JobSet that is restarted when a slice was preempted. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/gke_jobset.sh --name NAME --image IMAGE --accelerator KIND --topology AxB[xC] --workdir DIR
         [options] -- [arguments of lwd train]

Writes a JobSet manifest and hands it to kubectl apply. Every pod of a slice gets the same command; a preempted or
failed slice restarts all of them, and the run resumes; so does a failure that may pass (exit code 75). A mistake in the
command (exit code 2) ends it. Pods wait half an hour for each other, which --join_timeout after -- changes. The run
starts with the flags of XLA that `lwd plan --flags KIND` prints. Needs kubectl with access to a cluster that has JobSet,
and an image with lwd_jax[tpu], bash and the folder configs/ in its working folder.

  --name NAME           of the JobSet
  --image IMAGE         of the pods
  --accelerator KIND    such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
  --topology AxB[xC]    of a slice, such as 4x4
  --workdir DIR         one that all pods share: see --bucket
  --chips N             chips of a pod (4)
  --slices N            (1)
  --spot                on spot nodes
  --retries N           how many times to restart (10)
  --bucket BUCKET       mount gs://BUCKET as /mnt/bucket in every pod (the cluster's GCS FUSE driver); one with a
                        hierarchical namespace, because a checkpoint is committed by renaming its folder
  --service_account SA  of Kubernetes, with access to the bucket
  --namespace NS        (kubectl's own)
  --dry_run             print the manifest, apply nothing

example:
  bash launch/gke_jobset.sh --name sd3 --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 \
    --bucket my-bucket --workdir /mnt/bucket/runs/stage2 -- \
    --config=configs/stage2_sd3_1024.py --config.data.latents=/mnt/bucket/latents
TEXT
}

die() {
  echo "gke_jobset.sh: $1" >&2
  exit 2
}

name='' image='' accelerator='' topology='' workdir='' chips=4 slices=1 retries=10 bucket='' service_account=''
namespace='' spot='' dry_run=''
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
parse_arguments \
  'name|image|accelerator|topology|workdir|chips|slices|retries|bucket|service_account|namespace' 'spot|dry_run' "$@"
require name image accelerator topology workdir
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "--topology must be such as 4x4 or 4x4x4, not '$topology'."
[[ "$chips$slices$retries" =~ ^[0-9]+$ && "$chips" != 0 ]] ||
  die "--chips, --slices and --retries must be whole numbers."
total=$((${topology//x/*}))
((total % chips == 0)) || die "the $total chips of $topology do not divide into pods of $chips; set --chips."
hosts=$((total / chips))

json() { # a word as a JSON string, which is a YAML one
  local word="$1" backslash=\\ quote=\" code character escape
  word=${word//"$backslash"/"$backslash$backslash"}
  word=${word//"$quote"/"$backslash$quote"}
  for code in {1..31} 127; do
    printf -v escape '%04x' "$code"
    printf -v character '%b' "\\x${escape:2}"
    word=${word//"$character"/"${backslash}u$escape"}
  done
  printf '"%s"' "$word"
}

verbatim() { # Kubernetes reads $(NAME) in a command as a variable of the pod, and $$ as $
  local dollar=\$ word
  word=${1//"$dollar"/"$dollar$dollar"}
  json "$word"
}

# What the pods run: $0 is the accelerator, of which the table has the flags of XLA. What the image sets comes last.
# shellcheck disable=SC2016 # is expanded in the pod
start='LIBTPU_INIT_ARGS="$(lwd plan --flags "$0" || true) ${LIBTPU_INIT_ARGS:-}" exec lwd train "$@"'

manifest() {
  local word
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $retries
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: lwd, operator: In, values: [2]}
        template:
YAML
  [[ -z "$bucket" ]] || printf '          metadata:\n            annotations: {gke-gcsfuse/volumes: "true"}\n'
  cat <<YAML
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
              cloud.google.com/gke-tpu-topology: $(json "$topology")
YAML
  [[ -z "$spot" ]] || echo '              cloud.google.com/gke-spot: "true"'
  [[ -z "$service_account" ]] || echo "            serviceAccountName: $(json "$service_account")"
  cat <<YAML
            containers:
            - name: lwd
              image: $(json "$image")
              env:
              - {name: JAX_COMPILATION_CACHE_DIR, value: $(verbatim "$workdir/compiled")}
              resources:
                limits: {google.com/tpu: $chips}
              command: [bash, -c, $(verbatim "$start"), $(verbatim "$accelerator")]
              args:
YAML
  # Pods come one after the other: nodes are made for them, and each fetches the image. The last of two timeouts counts.
  for word in --workdir="$workdir" --join_timeout=1800 ${train[@]+"${train[@]}"}; do
    echo "              - $(verbatim "$word")"
  done
  # Workers hand batches over in /dev/shm, and a pod's own has 64 MB: they would die on the first.
  cat <<YAML
              volumeMounts:
              - {name: shm, mountPath: /dev/shm}
YAML
  [[ -z "$bucket" ]] || echo '              - {name: bucket, mountPath: /mnt/bucket}'
  cat <<YAML
            volumes:
            - {name: shm, emptyDir: {medium: Memory}}
YAML
  [[ -z "$bucket" ]] || cat <<YAML
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $(json "$bucket"), mountOptions: implicit-dirs}
YAML
}

if [[ "$dry_run" ]]; then
  manifest
  exit
fi
manifest | kubectl apply ${namespace:+--namespace="$namespace"} --filename=-
echo "gke_jobset.sh: $name is submitted. Its first pod:" \
  "kubectl logs --follow ${namespace:+--namespace=$namespace }job/$name-slice-0"
