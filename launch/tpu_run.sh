#!/usr/bin/env bash
# Runs `lwd train` on every worker of a Cloud TPU slice, and again on a new one when it was preempted. See --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'TEXT'
usage: bash launch/tpu_run.sh --name NAME --zone ZONE --type TYPE --workdir DIR [options] -- [arguments of lwd train]

Creates or finds a TPU slice, installs this checkout on all its workers, starts `lwd train` on all of them at once and
shows what worker 0 prints. When the slice was preempted it is made again and the run resumes; it is started again after
a failure that may pass (exit code 75). Interrupted, it leaves the run going; the same command finds it again. Needs
gcloud, logged in.

  --name NAME         of the TPU (and of its queued resource)
  --zone ZONE         such as us-west4-a
  --type TYPE         such as v5litepod-16: gcloud compute tpus accelerator-types list --zone=ZONE
  --workdir DIR       on the workers; a slice of several hosts needs one that they share: see --bucket
  --project PROJECT   (gcloud's own)
  --runtime VERSION   image of the workers (by type: v5litepod, v5p, v6e; must be given for others)
  --spot              cheaper, and may be preempted
  --queued            wait in the queue for the slice (a queued resource)
  --retries N         how many times to make a slice again that was preempted, or to start the run again (10)
  --bucket BUCKET     mount gs://BUCKET as /mnt/bucket on every worker, with gcsfuse. Make it with a hierarchical
                      namespace: a checkpoint is committed by renaming its folder
  --extras LIST       extras of setup.py to install (tpu); tpu,lpips for stage 1 with LPIPS
  --fetch DIR         at the end, copy the workdir from worker 0 into DIR
  --delete            at the end, delete the slice
  --poll SECONDS      between two looks at the state of the slice (20)
  --dry_run           print every command, run none

The run starts with the flags of XLA that `lwd plan --flags TYPE` prints, and those of LIBTPU_INIT_ARGS on the workers.
Paths after -- are the workers', relative to a copy of this checkout. Compiled programs are kept in DIR/compiled, so
that a slice that was made again does not compile again; so are the names and versions of what was installed, in
DIR/packages.txt (not under gs://), and such a slice installs the same. For newer ones remove the file and the slice.

example:
  bash launch/tpu_run.sh --name sd3 --zone us-west4-a --type v5litepod-16 --spot --queued --bucket my-bucket \
    --workdir /mnt/bucket/runs/stage2 -- --config=configs/stage2_sd3_1024.py --config.data.latents=/mnt/bucket/latents \
    --config.models.backbone=/mnt/bucket/sd3 --config.models.autoencoder=/mnt/bucket/runs/stage1
TEXT
}

die() {
  echo "tpu_run.sh: $1" >&2
  exit 2
}

name='' zone='' type='' workdir='' project='' runtime='' bucket='' extras=tpu fetch='' retries=10 poll=20
spot='' queued='' delete='' dry_run=''
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"
parse_arguments 'name|zone|type|workdir|project|runtime|bucket|extras|fetch|retries|poll' \
  'spot|queued|delete|dry_run' "$@"
require name zone type workdir
[[ "$retries$poll" =~ ^[0-9]+$ ]] || die "--retries and --poll must be whole numbers."
if [[ -z "$runtime" ]]; then
  case "$type" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "which --runtime does '$type' need? gcloud compute tpus versions list --zone=$zone" ;;
  esac
fi
where=(--zone="$zone" ${project:+--project="$project"})

# ------------------------------------------------------------------------------------------------------- commands

run() { # prints a command, or runs it
  if [[ "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_workers() { # WORKERS WORD...: the words, as they are, as a command on the workers
  local command
  printf -v command '%q ' "${@:2}"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$command"
}

create() {
  if [[ "$queued" ]]; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$runtime" \
      ${spot:+--spot}
  fi
}

remove() {
  if [[ "$queued" ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

describe() { # KIND FIELD: of the slice; nothing: gcloud says that there is none; UNKNOWN: it says nothing, five times
  local look errors="$scratch/describe"
  for look in 1 2 3 4 5; do
    if run gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>"$errors"; then
      return
    elif grep -qE 'NOT_FOUND|was not found' "$errors"; then
      return
    fi
    ((look == 5)) || sleep "$poll"
  done
  cat "$errors" >&2
  echo UNKNOWN
}

state() { # of the slice, or of its place in the queue; nothing: there is none
  local found=ACTIVE
  [[ -z "$queued" ]] || found="$(describe queued-resources state.state)"
  [[ "$found" != ACTIVE ]] || found="$(describe tpu-vm state)"
  echo "$found"
}

going_on() { [[ "$(state)" =~ ^(READY|UNKNOWN)$ ]]; } # nobody says that the slice is lost

install() {
  local archive="$scratch/lwd_jax.tar.gz"
  run tar --exclude=__pycache__ -czf "$archive" -C "$root" \
    setup.py pyproject.toml README.md LICENSE configs launch lwd_jax &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:lwd_jax.tar.gz" "${where[@]}" --worker=all &&
    on_workers all bash -c \
      'mkdir -p lwd_jax && tar -xzf lwd_jax.tar.gz -C lwd_jax && bash lwd_jax/launch/tpu_worker.sh "$@"' \
      tpu_worker.sh setup "$extras" "$workdir" "$bucket"
}

start() { on_workers all bash lwd_jax/launch/tpu_worker.sh start "$type" "$workdir" ${train[@]+"${train[@]}"}; }
follow() { on_workers 0 bash lwd_jax/launch/tpu_worker.sh follow; }
status() { on_workers 0 bash lwd_jax/launch/tpu_worker.sh status; } # running, or its exit code
going() { [[ "$(status 2>/dev/null || true)" == *running ]]; }
stop() { on_workers all bash lwd_jax/launch/tpu_worker.sh stop; }

copy_back() {
  run mkdir -p "$fetch"
  if [[ "$dry_run" ]]; then
    on_workers 0 tar --exclude=compiled -cz -C "$workdir" .
  else
    on_workers 0 tar --exclude=compiled -cz -C "$workdir" . | tar -xz -C "$fetch"
  fi
}

# ----------------------------------------------------------------------------------------------------------- the run

made() { [[ "$(state)" ]]; } # though gcloud failed: it was there already, or the answer alone was lost

until_ready() { # makes the slice if there is none, and waits for it
  while true; do
    local now
    now="$(state)"
    case "$now" in
      READY) return ;;
      '') create || made || ((attempt > 0 && attempt++ < retries)) || die "gcloud could not make $name." ;;
      PREEMPTED | SUSPENDED | TERMINATED | FAILED) remove ;;
      STOPPED | HIDDEN) die "$name is $now: start or delete it." ;;
      UNKNOWN) die "gcloud does not say whether $name is there: see above. The same command finds the run again." ;;
      *) echo "tpu_run.sh: $name is $now" ;;
    esac
    sleep "$poll"
  done
}

lost() { # whether the slice is going, or goes within six looks: workers die a little before the state says why
  local look
  for look in 1 2 3 4 5 6; do
    going_on || return 0
    ((look == 6)) || sleep "$poll"
  done
  return 1
}

# Sets `code`, that says why the run ended: a process that ends takes the others with it, by other codes. A mistake (2)
# that one worker alone met before the processes came together has the others wait for it, and end with 75. Worker 0 has
# been shown: where it ended by what is not its own to tell, or the others otherwise, shows what each said last.
judge() { # CODE of worker 0
  local codes
  codes="$(on_workers all bash lwd_jax/launch/tpu_worker.sh status 2>/dev/null | grep -xE '[0-9]+' | sort -u || true)"
  if grep -qx 2 <<<"$codes"; then code=2; elif grep -qx 75 <<<"$codes"; then code=75; else code="$1"; fi
  if [[ "$codes" != "$1" || ! "$1" =~ ^(75|143)$ ]]; then
    echo "tpu_run.sh: worker 0 ended with exit code $1. What every worker said last:"
    on_workers all bash lwd_jax/launch/tpu_worker.sh last 2>/dev/null || true
  fi
}

until_ended() { # shows worker 0; 0: the run ended, `code` says how; 1: the slice was lost
  local found
  while true; do
    follow || true # it ends with the run, with the slice or with the connection
    found="$(status || true)"
    found="${found##*$'\n'}"
    case "$found" in
      0 | 2) code="$found" && return 0 ;;
      running) going_on || return 1 ;;
      *) if lost; then return 1; elif [[ "$found" ]]; then judge "$found" && return 0; fi ;;
    esac
    sleep "$poll"
  done
}

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
code=0 attempt=0
if [[ "$dry_run" ]]; then
  state
  create
  install
  start
  follow
  status
else
  for ((attempt = 0; ; attempt++)); do
    until_ready
    if going || { install && start; }; then
      if until_ended; then
        ((code == 0)) || stop || true # a worker that still waits for the one that failed
        ((code == 75 && attempt < retries)) || break
        echo "tpu_run.sh: the run ended with a failure that may pass; starting it again ($((attempt + 1)) of $retries)"
        sleep "$poll"
        continue
      fi
    elif ! lost; then
      die "the workers could not be set up: see above."
    fi
    ((attempt < retries)) || die "$name was preempted $((attempt + 1)) times; the same command resumes the run."
    echo "tpu_run.sh: $name was preempted; making it again ($((attempt + 1)) of $retries)"
  done
fi
if [[ "$fetch" ]]; then copy_back; fi
if [[ "$delete" ]]; then
  remove
elif [[ -z "$dry_run" ]]; then
  echo "tpu_run.sh: $name is still there, and is paid for. To delete it: the same command with --delete, or gcloud."
fi
exit "$code"
