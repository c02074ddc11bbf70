# shellcheck shell=bash
# Sourced by the launchers: setup_venv EXTRA makes .venv if it is missing and installs this checkout in it.
# PYTHON names the interpreter to use (3.11 or newer).
setup_venv() {
  local python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lwd_jax needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 2
  }
  if [[ ! -x .venv/bin/python ]]; then
    "$python" -m venv .venv
  fi
  # setup.py is the only thing that decides what is installed: skip the step while it and the extra are unchanged.
  local stamp
  stamp="$1 $(.venv/bin/python --version) $(cksum <setup.py)"
  if [[ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]]; then
    echo "Installing $1 into .venv (once; a few minutes) ..."
    .venv/bin/python -m pip install --quiet --editable "$1"
    echo "$stamp" >.venv/installed
  fi
}
