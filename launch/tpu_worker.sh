#!/usr/bin/env bash
# What tpu_run.sh does on a worker of a TPU slice, in the copy of the checkout that it brought:
#   setup EXTRAS WORKDIR [BUCKET] | start TYPE WORKDIR [arguments of lwd train] | follow | last | status | stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
log="$root/run.log" pid="$root/run.pid" ended="$root/run.ended"

# By its last file too: where process 1 is a container's and reaps late or never, the dead still have their number.
running() { [[ -f "$pid" && ! -f "$ended" ]] && kill -0 "$(cat "$pid")" 2>/dev/null; }

setup() {
  local python=python3 kept="$2/packages.txt"
  if [[ "${3:-}" ]] && ! mountpoint -q /mnt/bucket; then
    sudo mkdir -p /mnt/bucket
    sudo chown "$USER" /mnt/bucket
    gcsfuse --implicit-dirs "$3" /mnt/bucket
  fi
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # the images' own may be older
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    python="$(python3 -m uv python find 3.12)"
  fi
  # shellcheck source=launch/setup_venv.sh
  source launch/setup_venv.sh
  # A run goes on with the packages that it began with, also on a slice that was made again weeks later: others may
  # compute something else, or not read its checkpoints. (By a copy: pip takes a space for the end of a name.)
  if [[ -f "$kept" ]]; then
    echo "Installing what the run began with, $kept; remove that file if this checkout needs newer ones."
    cp "$kept" packages.txt
    export PIP_CONSTRAINT=packages.txt
  fi
  PYTHON="$python" setup_venv "$root" "$1"
  if [[ ! -f "$kept" && "$kept" != *://* ]]; then
    mkdir -p "$2"
    .venv/bin/python -m pip freeze --quiet --exclude-editable >"$kept.$HOSTNAME"
    mv "$kept.$HOSTNAME" "$kept"
  fi
}

start() {
  if running; then
    echo "lwd train is running here already"
    return
  fi
  rm -f "$ended"
  # In a session of its own: it outlives the connection that started it.
  setsid nohup bash launch/tpu_worker.sh train "$@" >"$log" 2>&1 </dev/null &
  echo $! >"$pid"
}

train() {
  local code=0
  # What is set already comes last, where it is what counts; a type of which the table has no flags goes without.
  LIBTPU_INIT_ARGS="$(.venv/bin/lwd plan --flags "$1" || true) ${LIBTPU_INIT_ARGS:-}"
  export LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$2/compiled}"
  trap : TERM # is for lwd, which gets it too; this waits for its exit code
  .venv/bin/lwd train --workdir="$2" "${@:3}" || code=$?
  echo "$code" >"$ended"
}

follow() {
  while running; do sleep 0.2; done >/dev/null 2>&1 &
  tail -n +1 -F --sleep-interval=0.2 --pid=$! "$log" 2>/dev/null
}

last() { # what the log ends with, each line with the worker's name, without the addresses that an abort prints
  grep -vE '^ *@ +0x' "$log" | tail -n 40 | sed "s/^/$(hostname): /"
}

status() { if running; then echo running; else cat "$ended"; fi; }

stop() { # the whole session: told, and after a minute ended
  local second
  running || return 0
  kill -TERM -- "-$(cat "$pid")"
  for ((second = 0; second < 60; second++)); do
    running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$pid")" && echo 137 >"$ended"
}

"$@"
