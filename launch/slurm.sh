#!/usr/bin/env bash
# Runs `lwd train` on GPU nodes under SLURM: one task on each node, which takes all its GPUs. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/slurm.sh [--nodes N] [--gpus N] [--retries N] [--dry_run] [options of sbatch]
         -- [arguments of lwd train]

Installs this checkout with the extra [cuda] in its .venv (which all nodes must see) and submits a job with sbatch. Five
minutes before the job's time limit, and when it is preempted, all processes save at the same step; the job is then put
back in the queue and resumes, as after a failure that may pass (exit code 75). The run starts with the flags of XLA that
`lwd plan --flags gpu` prints, and the job's own.

  --nodes N     (1)
  --gpus N      of each node (8); with each come four cores, for Slurm by itself gives one core in all. Say otherwise by
                --cpus-per-gpu=N, --cpus-per-task=N, --exclusive or sbatch's variables of these names; --mem=0 takes all
                memory of a node
  --retries N   how many times the job may be put back (10)
  --dry_run     print the command, submit nothing

example:
  bash launch/slurm.sh --nodes 4 --gpus 8 --partition=gpu --time=12:00:00 -- \
    --config=configs/stage2_sd3_1024.py --workdir=/shared/runs/stage2 --config.data.latents=/shared/latents
TEXT
}

die() {
  echo "slurm.sh: $1" >&2
  exit 2
}

# srun tells the highest exit code of its tasks, and a process that ends takes the others with it, by an abort (134): the
# code that says why, 2 or 75, must come out above that.
task() { # in each task of the job: the words of a command
  local code=0
  trap : TERM # is for the command, which gets it too; this waits for its exit code
  "$@" || code=$?
  case "$code" in
    2) exit 202 ;;
    75) exit 175 ;;
    *) exit "$code" ;;
  esac
}

job() { # in the job: ROOT RETRIES [arguments of lwd train]
  local root="$1" retries="$2" code=0
  shift 2
  # What is set already comes last, where it is what counts.
  XLA_FLAGS="$("$root/.venv/bin/lwd" plan --flags gpu || true) ${XLA_FLAGS:-}"
  export XLA_FLAGS
  trap : TERM # is for the tasks, which get it too; this waits for their exit code
  # Tasks that save end one after the other: the first must not have the rest killed.
  srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash "$root/launch/slurm.sh" task "$root/.venv/bin/lwd" train "$@" ||
    code=$?
  case "$code" in
    202) code=2 ;;
    175) code=75 ;;
  esac
  if ((code == 143 || code == 75)) && ((${SLURM_RESTART_COUNT:-0} < retries)); then
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

if [[ "${1:-}" =~ ^(job|task)$ && "${SLURM_JOB_ID:-}" ]]; then
  "$@"
  exit
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nodes=1 gpus=8 retries=10 dry_run='' options=()
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"
stray() {
  [[ "$1" == --*=* || "$1" == --exclusive ]] ||
    die "'$1' is no option; write those of sbatch as --option=value, those of lwd train after --."
  options+=("$1")
}
says_cores() { # whether the options, or sbatch's variables, say how many
  local option
  [[ -z "${SBATCH_CPUS_PER_GPU:-}${SBATCH_CPUS_PER_TASK:-}${SBATCH_EXCLUSIVE:-}" ]] || return 0
  for option in ${options[@]+"${options[@]}"}; do
    case "$option" in --cpus-per-* | --exclusive | --exclusive=* | --tres-per-task=*cpu*) return 0 ;; esac
  done
  return 1
}
parse_arguments 'nodes|gpus|retries' dry_run "$@"
[[ "$nodes$gpus$retries" =~ ^[0-9]+$ ]] || die "--nodes, --gpus and --retries must be whole numbers."
((gpus == 0)) || says_cores || options+=(--cpus-per-gpu=4)
command=(
  sbatch --job-name=lwd --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" --requeue --open-mode=append
  --signal=TERM@300 ${options[@]+"${options[@]}"} "$root/launch/slurm.sh" job "$root" "$retries"
  ${train[@]+"${train[@]}"}
)
if [[ "$dry_run" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
# shellcheck source=launch/setup_venv.sh
source "$root/launch/setup_venv.sh"
setup_venv "$root" cuda
"${command[@]}"
